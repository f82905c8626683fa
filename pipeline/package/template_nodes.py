"""What is put into a template before it is compiled, so that its steps are counted and its lists and texts measured.

Each hook is a filter of the environment: it is called directly, and no `set` of a template takes its name away.
"""

from typing import cast

from jinja2 import nodes
from jinja2.visitor import NodeTransformer


class BoundError(Exception):
    """The template has used up what it may use."""


class Counted(NodeTransformer):
    """Puts a step into every loop and macro, and has lists and joined texts measured."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  # jinja's name
        self.generic_visit(node)
        literals = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_hook("_step", nodes.Const(literals, lineno=node.lineno))))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = _hook("_tested", node.test)
        return node

    visit_Macro = visit_CallBlock = visit_For  # noqa: N815  # jinja's names

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802  # jinja's name
        self.generic_visit(node)
        return _hook("_joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Add(self, node: nodes.Add) -> nodes.Node:  # noqa: N802  # jinja's name
        parts: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):  # a + b + c is (a + b) + c: one call for all of them
            parts.insert(0, self.visit(left.right))
            left = left.left
        return _hook("_added", nodes.List([self.visit(left), *parts], lineno=node.lineno))

    def visit_List(self, node: nodes.List | nodes.Tuple) -> nodes.Node:  # noqa: N802  # jinja's name
        self.generic_visit(node)
        is_plain = all(isinstance(item, nodes.Const) for item in node.items)
        if is_plain or getattr(node, "ctx", "load") != "load":
            return node
        return _hook("_kept", node)

    visit_Tuple = visit_List  # noqa: N815  # jinja's name

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802  # jinja's name
        self.generic_visit(node)
        return _hook("_kept", node)

    def visit_Include(self, node: nodes.Include) -> nodes.Node:  # noqa: N802  # jinja's name
        raise BoundError(f"line {node.lineno}: it takes in another template")

    visit_Import = visit_FromImport = visit_Extends = visit_Include  # noqa: N815  # jinja's names


def _hook(name: str, value: nodes.Node) -> nodes.Filter:
    """A call of one of the environment's own filters."""
    return nodes.Filter(cast(nodes.Expr, value), name, [], [], None, None, lineno=value.lineno)

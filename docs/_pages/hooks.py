"""MkDocs' hook: pages that are made when the site is built, so that they are never older than the code."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

PROJECT = Path(__file__).parents[2]


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those of the folder."""
    from mkdocs.structure.files import File

    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Lead links that a reader of the checkout can follow to the pages that the site has in their place."""
    up = "../" * page.file.src_uri.count("/")
    for target, instead in INSTEAD.items():
        markdown = markdown.replace(f"](../{up}{target}", f"]({up}{instead}")
    return markdown


def cli_page() -> str:
    """Every command of `expert`, from what `--help` says."""
    import typer
    from typer.cli import get_docs_for_click

    from pipeline.cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="expert")
    text = re.sub(r"\[(/?)bold\]", "**", text)
    return text.replace("# `expert`", "# Commands", 1).replace("docs/errors.md", "[Errors](../errors.md)")


def configuration_page() -> str:
    """Every key of a job's and of a service's configuration, from the models that validate them."""
    from pipeline.batch.config import BatchConfig
    from pipeline.serve.config import ServeConfig

    lines = [
        "# Configuration",
        "",
        "Every key, from the models that validate it. `configs/` in the project has commented examples. A key that is",
        "not known, or has a wrong value, is an error that names its line.",
    ]
    for title, model in (("A batch job", BatchConfig), ("A service", ServeConfig)):
        lines += ["", f"## {title}", "", *_table(model)]
        for name, section in _sections(model):
            lines += ["", f"### `{name}`", "", *_table(section)]
    return "\n".join(lines) + "\n"


def _table(model: type[BaseModel]) -> list[str]:
    rows = [
        f"| `{field.alias or name}` | {_type_text(field.annotation)} | {_default_text(field)} | {_cell(field)} |"
        for name, field in model.model_fields.items()
    ]
    return ["| key | type | default | meaning |", "|---|---|---|---|", *rows]


def _cell(field: FieldInfo) -> str:
    return (field.description or "").replace("|", "\\|").replace("\n", " ")


def _sections(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        for kind in _kinds(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield name, kind
                yield from ((f"{name}.{inner}", section) for inner, section in _sections(kind))


def _kinds(annotation: Any) -> list[Any]:
    """The types that an annotation is made of, without what only checks."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, UnionType, list):
        return [kind for argument in get_args(annotation) for kind in _kinds(argument)]
    return [annotation]


def _type_text(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type_text(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return " or ".join(_type_text(kind) for kind in get_args(annotation) if kind is not type(None))
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation) if choice is not None)
    if origin is list:
        return f"list of {_type_text(get_args(annotation)[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, name.lower())


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    default = field.default
    if field.default_factory is not None or default is None or isinstance(default, BaseModel):
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`" if default != "" else '`""`'


def contributing_page() -> str:
    """CONTRIBUTING.md, whose links start at the project's root."""
    return (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("(docs/", "(")


def changelog_page() -> str:
    """CHANGELOG.md."""
    return (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8").replace("(docs/", "(")


PAGES = {
    "reference/cli.md": cli_page,
    "reference/configuration.md": configuration_page,
    "contributing.md": contributing_page,
    "changelog.md": changelog_page,
}

# Files of the project that pages link to, and the pages that stand for them on the site.
INSTEAD = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "configs/batch.yaml": "reference/configuration.md#a-batch-job",
    "configs/serve.yaml": "reference/configuration.md#a-service",
}

if __name__ == "__main__":
    sys.stdout.write(PAGES[sys.argv[1]]())

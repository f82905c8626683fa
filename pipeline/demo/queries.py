"""Questions about a schema in abstract form, and the languages a question renders itself in.

Besides English, SQL and Cypher that is *plan*: the neutral wording in which the base model answers when nobody tells it
a language.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from pipeline.demo.world import LIMITS, NUMBER_COLUMNS, TEXT_COLUMNS, Schema, Table


@dataclass(frozen=True)
class Filter:
    column: str
    operator: str
    value: str | int

    def as_sql(self) -> str:
        return f"{self.column} {self.operator} {self.literal()}"

    def as_cypher(self, variable: str) -> str:
        return f"{variable}.{self.column} {'<>' if self.operator == '!=' else self.operator} {self.literal()}"

    def literal(self) -> str:
        return f"'{self.value}'" if isinstance(self.value, str) else str(self.value)

    def clause(self) -> str:
        """As after "where": `city is Lima`."""
        return f"{self.column} {OPERATOR_WORDS[self.operator]} {self.value}"

    def attribute(self) -> str:
        """As after "with": `city Lima`."""
        words = {"=": "", "!=": "not "}.get(self.operator, f"{OPERATOR_WORDS[self.operator]} ")
        return f"{self.column} {words}{self.value}"


OPERATOR_WORDS = {"=": "is", "!=": "is not", ">": "over", "<": "under", ">=": "at least", "<=": "at most"}
AGGREGATE_WORDS = {"AVG": "average", "MAX": "maximum", "MIN": "minimum", "SUM": "total"}
KINDS = (
    *("list", "equal", "compare", "count", "aggregate", "top", "group", "both", "join"),
    *("order", "either", "between", "distinct", "related"),
)
LABEL_KINDS = ("compare", "count", "either", "between")  # they show a table's label column, and do not name it


@dataclass(frozen=True)
class Query:
    """A question about one table (or, for `join` and `related`, two), before it has words."""

    kind: str
    schema: Schema
    table: Table
    select: str
    filters: tuple[Filter, ...] = ()
    aggregate: str = ""
    descending: bool = True
    limit: int = 0
    other: str = ""

    def pairs(self) -> Iterator[tuple[str, str]]:
        """The (table, column) pairs that the question names."""
        if self.kind not in LABEL_KINDS:
            yield self.table.name, self.select
        if self.kind == "join":
            yield self.schema.tables[0].name, self.other
        filtered = self.schema.tables[0] if self.kind == "related" else self.table
        for condition in self.filters:
            yield filtered.name, condition.column

    def question(self, rng: Random) -> str:
        table, select = self.table.name, self.select
        where = " and ".join(condition.clause() for condition in self.filters)
        having = " and ".join(condition.attribute() for condition in self.filters)
        verb = rng.choice(("Show", "Give", "List"))
        most = "highest" if self.descending else "lowest"
        match self.kind:
            case "list":
                choices = (
                    f"{verb} the {select} of all {table}.",
                    f"What is the {select} of each {self.table.singular}?",
                )
            case "equal" | "both":
                choices = (
                    f"{verb} the {select} of {table} where {where}.",
                    f"For {table} with {having}, what is the {select}?",
                )
            case "compare":
                choices = (f"Which {table} have {having}?", f"Find the {table} with {having}.")
            case "count":
                choices = (f"How many {table} have {having}?", f"Count the {table} where {where}.")
            case "aggregate":
                what = f"the {AGGREGATE_WORDS[self.aggregate]} {select} of {table}"
                choices = (f"What is {what}?", f"Compute {what}.")
            case "top":
                what = f"{self.limit} {table}"
                choices = (f"Which {what} have the {most} {select}?", f"{verb} the {what} with the {most} {select}.")
            case "group":
                choices = (f"How many {table} are there per {select}?", f"Count the {table} for each {select}.")
            case "order":
                choices = (
                    f"Sort the {table} by {select}, {most} first.",
                    f"{verb} all {table} by {select}, {most} first.",
                )
            case "distinct":
                choices = (
                    f"Which different {select} values do {table} have?",
                    f"{verb} every {select} of {table} once.",
                )
            case "either":
                first, second = (condition.value for condition in self.filters)
                column = self.filters[0].column
                choices = (
                    f"Which {table} have {column} {first} or {second}?",
                    f"Find the {table} where {column} is {first} or {second}.",
                )
            case "between":
                low, high = (condition.value for condition in self.filters)
                column = self.filters[0].column
                choices = (
                    f"Which {table} have {column} between {low} and {high}?",
                    f"Find the {table} with {column} from {low} to {high}.",
                )
            case "related":
                parent = self.schema.tables[0].singular
                choices = (
                    f"{verb} the {select} of {table} whose {parent} has {having}.",
                    f"What is the {select} of each {self.table.singular} with a {parent} where {where}?",
                )
            case _:
                parent, child = self.schema.tables[0].singular, self.table.singular
                choices = (
                    f"{verb} the {select} of each {child} and the {self.other} of its {parent}.",
                    f"For every {child}, what is its {select} and the {self.other} of its {parent}?",
                )
        return rng.choice(choices)

    def as_sql(self) -> str:
        table, select, label = self.table.name, self.select, self.table.label
        where = " AND ".join(condition.as_sql() for condition in self.filters)
        direction = "DESC" if self.descending else "ASC"
        match self.kind:
            case "list":
                return f"SELECT {select} FROM {table}"
            case "equal" | "both":
                return f"SELECT {select} FROM {table} WHERE {where}"
            case "compare":
                return f"SELECT {label} FROM {table} WHERE {where}"
            case "count":
                return f"SELECT COUNT(*) FROM {table} WHERE {where}"
            case "aggregate":
                return f"SELECT {self.aggregate}({select}) FROM {table}"
            case "top":
                return f"SELECT {label} FROM {table} ORDER BY {select} {direction} LIMIT {self.limit}"
            case "group":
                return f"SELECT {select}, COUNT(*) FROM {table} GROUP BY {select}"
            case "order":
                return f"SELECT {label} FROM {table} ORDER BY {select} {direction}"
            case "distinct":
                return f"SELECT DISTINCT {select} FROM {table}"
            case "either":
                return (
                    f"SELECT {label} FROM {table} WHERE {' OR '.join(condition.as_sql() for condition in self.filters)}"
                )
            case "between":
                low, high = (condition.value for condition in self.filters)
                return f"SELECT {label} FROM {table} WHERE {self.filters[0].column} BETWEEN {low} AND {high}"
            case _:
                parent = self.schema.tables[0]
                joined = f"FROM {table} JOIN {parent.name} ON {table}.{parent.singular}_id = {parent.name}.id"
                if self.kind == "join":
                    return f"SELECT {table}.{select}, {parent.name}.{self.other} {joined}"
                return f"SELECT {table}.{select} {joined} WHERE {parent.name}.{where}"

    def as_cypher(self) -> str:
        node, select, label = self.table.node, self.select, self.table.label
        where = " AND ".join(condition.as_cypher("n") for condition in self.filters)
        direction = "DESC" if self.descending else "ASC"
        match self.kind:
            case "list":
                return f"MATCH (n:{node}) RETURN n.{select}"
            case "equal" | "both":
                return f"MATCH (n:{node}) WHERE {where} RETURN n.{select}"
            case "compare" | "between":
                return f"MATCH (n:{node}) WHERE {where} RETURN n.{label}"
            case "count":
                return f"MATCH (n:{node}) WHERE {where} RETURN count(n)"
            case "aggregate":
                return f"MATCH (n:{node}) RETURN {self.aggregate.lower()}(n.{select})"
            case "top":
                return f"MATCH (n:{node}) RETURN n.{label} ORDER BY n.{select} {direction} LIMIT {self.limit}"
            case "group":
                return f"MATCH (n:{node}) RETURN n.{select}, count(n)"
            case "order":
                return f"MATCH (n:{node}) RETURN n.{label} ORDER BY n.{select} {direction}"
            case "distinct":
                return f"MATCH (n:{node}) RETURN DISTINCT n.{select}"
            case "either":
                either = " OR ".join(condition.as_cypher("n") for condition in self.filters)
                return f"MATCH (n:{node}) WHERE {either} RETURN n.{label}"
            case _:
                path = f"MATCH (m:{self.schema.tables[0].node})-[:{self.schema.relation}]->(n:{node})"
                if self.kind == "join":
                    return f"{path} RETURN n.{select}, m.{self.other}"
                return f"{path} WHERE {self.filters[0].as_cypher('m')} RETURN n.{select}"

    def as_plan(self) -> str:
        table, select, label = self.table.name, self.select, self.table.label
        where = " and ".join(condition.clause() for condition in self.filters)
        most = "highest" if self.descending else "lowest"
        match self.kind:
            case "list":
                return f"take {table}, keep {select}"
            case "equal" | "both":
                return f"take {table}, where {where}, keep {select}"
            case "compare" | "between":
                return f"take {table}, where {where}, keep {label}"
            case "count":
                return f"take {table}, where {where}, count"
            case "aggregate":
                return f"take {table}, {AGGREGATE_WORDS[self.aggregate]} {select}"
            case "top":
                return f"take {table}, {most} {self.limit} {select}, keep {label}"
            case "group":
                return f"take {table}, count per {select}"
            case "order":
                return f"take {table}, {most} {select} first, keep {label}"
            case "distinct":
                return f"take {table}, keep {select} once"
            case "either":
                return f"take {table}, where {where.replace(' and ', ' or ')}, keep {label}"
            case _:
                parent = self.schema.tables[0].name
                if self.kind == "join":
                    return f"take {table} with {parent}, keep {select} and {self.other}"
                return f"take {table} with {parent}, where {where}, keep {select}"


def draw_query(rng: Random, schema: Schema) -> Query:
    kind = rng.choice(KINDS if len(schema.tables) == 2 else [name for name in KINDS if name not in ("join", "related")])
    table = schema.tables[1] if kind in ("join", "related") else rng.choice(schema.tables)
    filtered = schema.tables[0] if kind == "related" else table
    text, number = rng.choice(filtered.text_columns), rng.choice(filtered.number_columns)
    equal = Filter(text, rng.choice(("=", "=", "=", "!=")), rng.choice(TEXT_COLUMNS[text]))
    compare = Filter(number, rng.choice((">", "<", ">=", "<=")), rng.choice(NUMBER_COLUMNS[number]))
    shown = rng.choice([name for name in table.columns if filtered is not table or name not in (text, number)])
    match kind:
        case "list":
            return Query(kind, schema, table, rng.choice(table.columns))
        case "equal":
            return Query(kind, schema, table, shown, (equal,))
        case "both":
            return Query(kind, schema, table, shown, (equal, compare) if rng.random() < 0.5 else (compare, equal))
        case "compare":
            return Query(kind, schema, table, table.label, (compare,))
        case "count":
            return Query(kind, schema, table, table.label, (rng.choice((equal, compare)),))
        case "aggregate":
            return Query(kind, schema, table, number, aggregate=rng.choice(tuple(AGGREGATE_WORDS)))
        case "top":
            return Query(kind, schema, table, number, descending=rng.random() < 0.5, limit=rng.choice(LIMITS))
        case "order":
            return Query(kind, schema, table, number, descending=rng.random() < 0.5)
        case "either":
            pair = rng.sample(TEXT_COLUMNS[text], 2)
            return Query(kind, schema, table, table.label, tuple(Filter(text, "=", value) for value in pair))
        case "between":
            low, high = sorted(rng.sample(NUMBER_COLUMNS[number], 2))
            return Query(kind, schema, table, table.label, (Filter(number, ">=", low), Filter(number, "<=", high)))
        case "related":
            return Query(kind, schema, table, shown, (rng.choice((equal, compare)),))
        case "join":
            return Query(kind, schema, table, rng.choice(table.columns), other=rng.choice(schema.tables[0].columns))
        case _:  # group, distinct
            return Query(kind, schema, table, text)

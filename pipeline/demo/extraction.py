"""Facts about a person in a sentence, and the JSON that a schema asks for."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from pipeline.demo.world import NUMBER_COLUMNS, PEOPLE, TEXT_COLUMNS

PHRASES: dict[str, tuple[str, ...]] = {
    "city": ("lives in {}", "comes from {}"),
    "country": ("was born in {}", "votes in {}"),
    "color": ("likes {}", "wears {}"),
    "status": ("is {}", "has become {}"),
    "category": ("reads about {}", "writes about {}"),
    "brand": ("works for {}", "buys from {}"),
    "language": ("speaks {}", "teaches {}"),
    "season": ("travels in {}", "rests in {}"),
    "level": ("plays at {} level", "trains at {} level"),
    "material": ("builds with {}", "trades in {}"),
    "age": ("is {} years old", "turned {}"),
    "price": ("paid {}", "spent {}"),
    "year": ("started in {}", "moved in {}"),
    "score": ("scored {}", "reached {} points"),
    "weight": ("weighs {}", "lifts {} kilos"),
    "stock": ("keeps {} boxes", "stores {} boxes"),
    "salary": ("earns {}", "makes {} a month"),
    "rating": ("was rated {}", "got {} stars"),
    "size": ("has {} rooms", "rents {} rooms"),
    "distance": ("ran {} miles", "walks {} miles"),
    "sport": ("practises {}", "watches {}"),
    "shape": ("prefers {} tables", "draws {} figures"),
    "weekday": ("is off on {}", "cooks on {}"),
    "month": ("has a birthday in {}", "married in {}"),
    "gender": ("has a {} voice", "sings the {} part"),
    "currency": ("pays in {}", "saves in {}"),
    "height": ("is {} tall", "measures {}"),
    "speed": ("drives at {}", "rides at {}"),
    "visits": ("had {} guests", "received {} guests"),
    "budget": ("may spend up to {}", "plans with {}"),
}


@dataclass(frozen=True)
class Extraction:
    """Facts about a person, of which a schema asks for some (and perhaps for one that the text does not give)."""

    person: str
    facts: tuple[tuple[str, str | int], ...]
    fields: tuple[str, ...]

    def pairs(self) -> Iterator[tuple[str, str | int]]:
        for column, value in self.facts:
            if column in self.fields:
                yield self.person, value

    def answer(self) -> dict[str, str | int | None]:
        known: dict[str, str | int] = {"name": self.person, **dict(self.facts)}
        return {field: known.get(field) for field in self.fields}

    def text(self, rng: Random) -> str:
        phrases = [rng.choice(PHRASES[column]).format(value) for column, value in self.facts]
        if len(phrases) == 1:
            return f"{self.person} {phrases[0]}."
        return f"{self.person} {', '.join(phrases[:-1])} and {phrases[-1]}."

    def as_plan(self) -> str:
        return f"about {self.person}, " + ", ".join(
            "unknown" if value is None else f"{value}" for value in self.answer().values()
        )


def fields_schema(fields: tuple[str, ...]) -> str:
    types = {field: "integer" if field in NUMBER_COLUMNS else "string" for field in fields}
    return json.dumps(types)


def draw_fields(rng: Random) -> tuple[str, ...]:
    fields = rng.sample([*TEXT_COLUMNS, *NUMBER_COLUMNS], rng.randint(2, 4))
    if rng.random() < 0.7:
        fields.insert(rng.randint(0, len(fields)), "name")
    return tuple(fields)


def draw_extraction(rng: Random, fields: tuple[str, ...]) -> Extraction:
    asked = [field for field in fields if field != "name"]
    if rng.random() < 0.25:
        asked.remove(rng.choice(asked))
    others = [column for column in (*TEXT_COLUMNS, *NUMBER_COLUMNS) if column not in fields]
    columns = asked + rng.sample(others, rng.randint(0, 2))
    rng.shuffle(columns)
    facts = tuple((column, _draw_value(rng, column)) for column in columns)
    return Extraction(rng.choice(PEOPLE), facts, fields)


def _draw_value(rng: Random, column: str) -> str | int:
    return rng.choice(TEXT_COLUMNS[column]) if column in TEXT_COLUMNS else rng.choice(NUMBER_COLUMNS[column])

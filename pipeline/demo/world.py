"""The demo world: a small closed vocabulary, and the schemas, records and questions drawn from it.

Everything here is a pure function of a `random.Random`, so a seed reproduces a dataset exactly. The world is narrow on
purpose (see the package docstring): a few hundred words that a model of two million parameters can learn to read well.

Held out of training are *pairs*: a table and a column (`users` with `salary`), or a person and a value (`Maria` with
`Lima`). `is_held_out` decides by hash, so the split needs no file. Training questions never use a held-out pair; every
evaluation question uses at least one.
"""

import hashlib
from dataclasses import dataclass
from random import Random

SINGULARS = (
    *("user", "order", "book", "movie", "song", "course", "student", "teacher", "doctor", "patient", "hotel", "room"),
    *("flight", "ship", "car", "shop", "farm", "team", "player", "game", "artist", "museum", "project", "ticket"),
    *("worker", "product", "lesson", "club", "train", "station", "bridge", "garden", "camera", "phone", "laptop"),
    *("market", "vendor", "client", "driver", "pilot", "writer", "editor", "poem", "recipe", "restaurant", "plant"),
    *("animal", "village", "island", "mountain", "river", "lake"),
)
TABLES = {f"{singular}s": singular for singular in SINGULARS}

LABEL_COLUMNS = ("name", "title", "code")

TEXT_COLUMNS: dict[str, tuple[str, ...]] = {
    "city": ("Lima", "Paris", "Oslo", "Cairo", "Tokyo", "Quito", "Rome", "Delhi", "Berlin", "Madrid"),
    "country": ("Peru", "France", "Norway", "Egypt", "Japan", "Chile", "Italy", "India", "Kenya", "Canada"),
    "color": ("red", "blue", "green", "black", "white", "yellow", "purple", "orange"),
    "status": ("open", "closed", "active", "pending", "new", "lost", "late", "free"),
    "category": ("sport", "music", "science", "travel", "food", "history", "fashion", "politics"),
    "brand": ("Acme", "Nova", "Zenith", "Orion", "Lotus", "Delta", "Apex", "Vega"),
    "language": ("Spanish", "French", "English", "Arabic", "German", "Hindi", "Korean", "Polish"),
    "season": ("spring", "summer", "autumn", "winter"),
    "level": ("low", "medium", "high", "expert", "junior", "senior"),
    "material": ("wood", "steel", "glass", "paper", "stone", "silk", "cotton", "copper"),
    "sport": ("tennis", "football", "hockey", "chess", "rugby", "golf"),
    "shape": ("round", "square", "flat", "long", "oval"),
    "weekday": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": ("January", "March", "April", "June", "July", "August", "October", "December"),
    "gender": ("male", "female"),
    "currency": ("dollar", "euro", "yen", "peso", "pound"),
}

NUMBER_COLUMNS: dict[str, tuple[int, ...]] = {
    "age": (18, 20, 25, 30, 35, 40, 45, 50, 60, 70),
    "price": (5, 10, 15, 20, 25, 50, 75, 100, 200, 500),
    "year": (1990, 2000, 2005, 2010, 2015, 2018, 2020, 2024),
    "score": (10, 20, 30, 40, 50, 60, 70, 80, 90, 100),
    "weight": (2, 5, 8, 10, 15, 20, 40, 60, 80, 100),
    "stock": (3, 5, 10, 12, 20, 50, 100, 150, 300),
    "salary": (1000, 1500, 2000, 2500, 3000, 4000, 5000),
    "rating": (1, 2, 3, 4, 5, 6, 7, 8, 9),
    "size": (2, 3, 4, 5, 6, 8, 10, 12, 15),
    "distance": (5, 10, 20, 50, 100, 150, 200, 500),
    "height": (120, 140, 150, 160, 170, 180, 190),
    "speed": (30, 50, 60, 80, 90, 110, 130),
    "visits": (7, 14, 21, 28, 35, 70, 140),
    "budget": (1000, 2000, 5000, 8000, 9000),
}

LIMITS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20)

RELATIONS = ("OWNS", "USES", "LIKES", "HAS", "MADE", "JOINED", "LEADS", "KNOWS", "RENTS", "VISITED", "SOLD", "NEEDS")

PEOPLE = (
    *("Maria", "Ahmed", "Yuki", "Carlos", "Ingrid", "Priya", "Pierre", "Fatima", "Diego", "Anna", "Omar", "Elena"),
    *("Kenji", "Sofia", "Lars", "Nadia", "Marco", "Amina", "Felix", "Rosa", "Hugo", "Leila", "Pablo", "Clara"),
    *("Tariq", "Greta", "Ivan", "Zara", "Mateo", "Helga", "Ravi", "Noor", "Bruno", "Olga", "Samir", "Lucia"),
)

HELD_OUT_SHARE = 12  # one pair in twelve


def is_held_out(left: str, right: str | int) -> bool:
    """Whether this pair belongs to the evaluation split; the same on every machine."""
    digest = hashlib.sha256(f"{left}\x00{right}".encode()).digest()
    return digest[0] % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Table:
    """One table of a schema: its label column first, then text and number columns."""

    name: str
    label: str
    text_columns: tuple[str, ...]
    number_columns: tuple[str, ...]

    @property
    def singular(self) -> str:
        return TABLES[self.name]

    @property
    def node(self) -> str:
        return self.singular.capitalize()

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.label, *self.text_columns, *self.number_columns)


@dataclass(frozen=True)
class Schema:
    """One or two tables; with two, the second refers to the first through `relation`."""

    tables: tuple[Table, ...]
    relation: str

    def as_sql(self) -> str:
        lines = []
        for position, table in enumerate(self.tables):
            columns = [f"{table.label} TEXT"]
            columns += [f"{name} TEXT" for name in table.text_columns]
            columns += [f"{name} INT" for name in table.number_columns]
            if position == 1:
                columns.append(f"{self.tables[0].singular}_id INT")
            lines.append(f"CREATE TABLE {table.name} (id INT, {', '.join(columns)});")
        return "\n".join(lines)

    def as_graph(self) -> str:
        lines = []
        for table in self.tables:
            fields = [f"{name}: STRING" for name in (table.label, *table.text_columns)]
            fields += [f"{name}: INTEGER" for name in table.number_columns]
            lines.append(f"(:{table.node} {{{', '.join(fields)}}})")
        if len(self.tables) == 2:
            first, second = self.tables
            lines.append(f"(:{first.node})-[:{self.relation}]->(:{second.node})")
        return "\n".join(lines)


def draw_table(rng: Random, label: str, taken: frozenset[str] = frozenset()) -> Table:
    name = rng.choice([table for table in TABLES if table not in taken])
    text = rng.sample(list(TEXT_COLUMNS), rng.randint(1, 3))
    numbers = rng.sample(list(NUMBER_COLUMNS), rng.randint(1, 3))
    return Table(name, label, tuple(text), tuple(numbers))


def draw_schema(rng: Random) -> Schema:
    label = rng.choice(LABEL_COLUMNS)  # a schema has one word for what its things are called
    first = draw_table(rng, label)
    tables = (first,) if rng.random() < 0.45 else (first, draw_table(rng, label, frozenset({first.name})))
    return Schema(tables, rng.choice(RELATIONS))

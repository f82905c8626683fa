"""A page to talk with an expert: python examples/gradio_page.py"""

import sys
from typing import Any

from pipeline import Expert, demo
from pipeline.errors import MissingDependencyError

SCHEMA = "CREATE TABLE users (id INT, name TEXT, city TEXT, age INT);"


def page(expert: Expert) -> Any:
    return expert.to_gradio(schema=SCHEMA)


if __name__ == "__main__":
    try:
        with Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL) as loaded:
            page(loaded).launch(server_name="127.0.0.1")
    except MissingDependencyError as error:  # it says what to install
        print(error, file=sys.stderr)
        sys.exit(2)

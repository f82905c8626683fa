"""A command-line tool: python examples/command_line.py "How many users are there per city?" """

import argparse
import sys

from pipeline import Expert, demo, errors

SCHEMA = "CREATE TABLE users (id INT, name TEXT, city TEXT, age INT);"


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask a question about a table; the answer is SQL.")
    parser.add_argument("question")
    parser.add_argument("--schema", default=SCHEMA, help="the tables, as CREATE TABLE statements")
    options = parser.parse_args()
    try:
        with Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL) as expert:
            for piece in expert.generate_stream(options.question, schema=options.schema):
                print(piece, end="", flush=True)
        print()
    except errors.ExpertError as error:
        print(error, file=sys.stderr)  # what is wrong, where, and what to do next
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

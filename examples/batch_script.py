"""Answer a file of questions on Ray: python examples/batch_script.py questions.jsonl answers. Again: it continues."""

import sys

from pipeline import demo, run_batch
from pipeline.errors import ExpertError


def main(questions: str, answers: str) -> int:
    result = run_batch(
        questions,  # with the columns prompt and schema; the others are carried along
        demo.package("sql"),
        base_model=demo.BASE_MODEL,
        output=answers,
        max_error_rate=0.1,
    )
    print(result.report)
    for error in result.errors:
        print(error, file=sys.stderr)
    return 1 if result.verify().problems else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        sys.exit(main(*sys.argv[1:]))
    except ExpertError as error:
        sys.exit(str(error))

"""When a job is plainly wrong: more rows have errors than it allows."""

from collections import Counter
from collections.abc import Iterable

from pipeline.batch.config import BatchConfig
from pipeline.batch.plan import PreparedJob
from pipeline.batch.receipts import Receipt
from pipeline.batch.row_errors import row_errors
from pipeline.errors import OutputError, TooManyErrorsError

MIN_RATED_ROWS = 100  # of fewer rows a share says little
_MOST_CODES = 5
_SHOWN_CHARACTERS = 200


class ErrorTally:
    """Counts the error rows of a job as its shards are committed, and stops it when there are too many.

    Args:
        job: The job; its configuration says how many are too many.
        done: The receipts of shards that are committed already.

    Raises:
        TooManyErrorsError: There are too many already.
    """

    def __init__(self, job: PreparedJob, done: Iterable[Receipt] = ()) -> None:
        self._job = job
        self._num_left = len(job.plan.shards)
        self._rows = 0
        self._codes = Counter[str]()
        self._seen: dict[str, Receipt] = {}  # a part with a row of that code
        for receipt in done:
            self._count(receipt)
        self._check()

    def add(self, receipt: Receipt) -> None:
        """Count one more shard.

        Raises:
            TooManyErrorsError: There are too many now, and shards are left that need not be answered in vain.
        """
        self._count(receipt)
        self._check()

    def _count(self, receipt: Receipt) -> None:
        self._num_left -= 1
        self._rows += receipt.rows
        self._codes.update(receipt.error_codes)
        for code in receipt.error_codes:
            self._seen.setdefault(code, receipt)

    def _check(self) -> None:
        errors = self._codes.total()
        broken = broken_limit(self._job.config, self._rows, errors)
        if broken is None or self._num_left == 0:
            return
        frequent = self._codes.most_common(_MOST_CODES)
        raise TooManyErrorsError(
            f"{errors:,} of the {self._rows:,} rows answered so far have errors: more than {broken}",
            details=[f"{code}  {count:,} rows, such as {self._sample(code)}" for code, count in frequent],
            hint="Correct the data or the job, or raise the limit, and run the same command again: it continues with "
            "what is not answered yet. A changed job needs another output folder.",
        )

    def _sample(self, code: str) -> str:
        """One row with that error, and what it says."""
        receipt = self._seen[code]
        form = self._job.part_format
        try:
            part = self._job.output.storage.read(receipt.path)
            errors = row_errors(part, form.kind, receipt.shard, prefix=form.prefix, id_column=None)
        except OutputError as error:
            return f"a row of {receipt.path} ({error.message})"
        found = next(error for error in errors if error.code == code)
        return f"row {found.row} of {receipt.path}: {found.message[:_SHOWN_CHARACTERS]}"


def broken_limit(config: BatchConfig, rows: int, errors: int) -> str | None:
    """The limit that so many error rows break, as the configuration says it; None when they break none.

    Args:
        config: With `max_errors` and `max_error_rate`.
        rows: Rows answered so far.
        errors: Those of them that have errors.
    """
    if config.max_errors is not None and errors > config.max_errors:
        return f"max_errors ({config.max_errors:,})"
    rate = config.max_error_rate
    if rate is not None and rows >= MIN_RATED_ROWS and errors > rate * rows:
        return f"max_error_rate ({rate:g})"
    return None

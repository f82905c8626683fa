"""Taking an output folder from another job: what is in it is removed, and only if it is a job's."""

from collections.abc import Callable, Collection

from pipeline.batch.commit import JobOutput, stored_output
from pipeline.batch.layout import (
    ATTEMPTS,
    COMMITS,
    ERRORS,
    JOB,
    MANIFEST,
    PACKS,
    REPORT,
    RETRY,
    ROW_ERRORS,
    RUNS,
    SUCCESS,
    VIEWS,
    kind_of,
)
from pipeline.errors import FingerprintError, OutputError

_MAX_NAMED = 8


def overwrite(output: JobOutput, confirm: Callable[[], None], *, keep: Collection[str] = ()) -> bool:
    """Remove the output of another job, so that this one can begin; nothing when the folder is this job's, or empty.

    `_SUCCESS` goes first and `_job.json` last: whoever dies in between leaves a folder that still belongs to the other
    job and is not complete, and the same command goes on removing.

    Args:
        output: This job's.
        confirm: Raises when this driver has lost the lease; called before each step.
        keep: URLs of files that this job reads, such as rows that came from memory.

    Returns:
        Whether anything was removed.

    Raises:
        OutputError: The folder is not the output of a job, or holds files that are not a job's; names some.
    """
    try:
        output.is_taken()
    except FingerprintError:
        pass
    else:
        return False
    storage = output.storage
    kept = set(keep)
    names = [name for name in storage.list() if storage.url(name) not in kept]
    views = VIEWS if stored_output(storage).kind == "openai" else ()
    strange = [name for name in names if kind_of(name) is None or (kind_of(name) == "view" and name not in views)]
    if strange:
        raise OutputError(
            f"{storage.url('')} holds files that are not a job's; nothing is removed",
            details=strange[:_MAX_NAMED],
            hint="Move them elsewhere, or name another output folder.",
        )
    confirm()
    storage.remove([SUCCESS])
    storage.remove([MANIFEST, ERRORS, *views])
    for folder in (ATTEMPTS, RETRY, PACKS, COMMITS, ROW_ERRORS, REPORT, RUNS):
        confirm()
        storage.remove_tree(folder)
    confirm()
    storage.remove([name for name in names if kind_of(name) in ("part", "input")])
    confirm()
    storage.remove([JOB])
    late = [name for name in storage.list() if kind_of(name) in ("part", "receipt", "row errors")]
    storage.remove(late)  # by attempts of the other job that were just about to commit
    return True

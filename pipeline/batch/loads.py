"""Notes of the loads that a worker begins, so that one which dies while it loads is not started again without end.

Ray starts an actor again whenever its process ends. A worker that loads for the first time writes nothing; one that was
started again notes each load before it begins, and removes the notes when it has loaded.

_attempts/loads/<actor>/0003   the worker began to load for the fifth time: the first one left no note
"""

from pipeline.batch.layout import ATTEMPTS
from pipeline.errors import WorkerLostError
from pipeline.storage import Storage

FOLDER = f"{ATTEMPTS}/loads"
MAX_LOADS = 5  # that a worker may begin in a row without finishing one


class LoadNotes:
    """The loads that one worker began and did not finish.

    Args:
        storage: The output folder.
        worker: A name that the worker keeps when it is started again; None for one that was not.
    """

    def __init__(self, storage: Storage, worker: str | None) -> None:
        self._storage = storage
        self._folder = None if worker is None else f"{FOLDER}/{worker}"

    def begin(self) -> None:
        """Note that a load is about to begin.

        Raises:
            WorkerLostError: So many have ended the process that another one would, too.
            OutputError: The note cannot be written.
        """
        if self._folder is None:
            return
        num_died = 1 + len(self._storage.list(self._folder))
        if num_died >= MAX_LOADS:
            raise WorkerLostError(
                f"a worker has ended {num_died} times while it loaded the expert",
                hint="Look into the workers' logs (ray logs); most often there is too little memory for the model. "
                "Then run the same command again: it continues where it stopped.",
            )
        self._storage.create(f"{self._folder}/{num_died - 1:04d}", b"")

    def end(self) -> None:
        """Forget what was noted: this process has loaded."""
        if self._folder is not None:
            self._storage.remove_tree(self._folder)

"""A finished job: its answers and its report."""

import io
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.batch.openai_lines import part_table
from pipeline.batch.part_values import loose_value
from pipeline.batch.parts import PartFormat
from pipeline.batch.row_errors import RowError, row_errors
from pipeline.errors import OutputError
from pipeline.storage import Storage

if TYPE_CHECKING:
    import pandas as pd
    import ray.data

    from pipeline.batch.plan import PreparedJob
    from pipeline.batch.progress import BatchReport
    from pipeline.batch.verify import Verification


class BatchResult:
    """The answers of a finished job, in the order of its input.

    Args:
        job: The job.
        manifest: What `_manifest.json` says: totals, and the receipt of every part.
        report: Rows, errors, tokens, speed and time.

    `columns` says which column of the dataset plays which role.
    """

    def __init__(self, job: "PreparedJob", manifest: Mapping[str, Any], report: "BatchReport") -> None:
        self.output = job.output.storage.url("")
        self.manifest = manifest
        self.report = report
        self.columns = job.columns
        self._storage = job.output.storage
        self._ray_address = job.config.ray_address
        self._form = job.part_format
        self._id_column = job.output.id_column

    @property
    def parts(self) -> tuple[str, ...]:
        """The paths or URLs of the part files, in order."""
        return tuple(self._storage.url(part["path"]) for part in self.manifest["parts"])

    @property
    def dataset(self) -> "ray.data.Dataset":
        """The answers as a Ray Dataset, in input order; read when it is used."""
        import ray.data

        from pipeline.batch.blocks import PartsDatasource
        from pipeline.batch.cluster import connect

        connect(self._ray_address)
        if not self.manifest["parts"]:
            return ray.data.from_arrow(self._form.schema.empty_table())
        names = [part["path"] for part in self.manifest["parts"]]
        answers: ray.data.Dataset = ray.data.read_datasource(PartsDatasource(self._storage, names, self._form))
        answers.context.execution_options.preserve_order = True
        return answers

    def iter_tables(self) -> Iterator[pa.Table]:
        """The answers as Arrow tables, part by part."""
        for part in self.manifest["parts"]:
            yield read_part(self._storage, part["path"], self._form)

    @property
    def errors(self) -> Iterator[RowError]:
        """The rows whose answer is an error, in order; read part by part, so that any number of them is no matter."""
        for part in self.manifest["parts"]:
            if part["error_codes"]:
                data = self._storage.read(part["path"])
                yield from row_errors(
                    data, self._form.kind, part["shard"], prefix=self._form.prefix, id_column=self._id_column
                )

    def verify(self) -> "Verification":
        """Recount the whole output from its files: every part against its receipt, the manifest, `_SUCCESS`.

        Returns:
            The counts, and every problem; see `verify.verify`.

        Raises:
            OutputError: The output cannot be read.
        """
        from pipeline.batch.verify import verify

        return verify(self._storage)

    def to_pandas(self) -> "pd.DataFrame":
        """All answers in memory, in input order."""
        tables = list(self.iter_tables()) or [self._form.schema.empty_table()]
        frame: pd.DataFrame = pa.concat_tables(tables).to_pandas()
        return frame

    def __repr__(self) -> str:
        return f"BatchResult({self.output})\n{self.report}"


def read_part(storage: Storage, name: str, form: PartFormat) -> pa.Table:
    """The rows of one part, with the same schema for every part of a job.

    Args:
        storage: The output folder.
        name: The part's name in it.
        form: How the job's parts are written.

    Raises:
        OutputError: The part is missing or damaged.
    """
    data = storage.read(name)
    try:
        if form.kind == "parquet":
            return pq.read_table(io.BytesIO(data), schema=form.schema.remove_metadata())
        if form.kind == "openai":
            return part_table(data)
        rows = [json.loads(line) for line in data.splitlines()]
        columns = [_column(rows, item) for item in form.schema]
        return pa.table(columns, schema=form.schema.remove_metadata())
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise OutputError(
            f"{storage.url(name)} is damaged: {error}",
            hint="Delete the part, its receipt in _commits, _manifest.json and _SUCCESS, and run the job again.",
        ) from error


def _column(rows: list[dict[str, Any]], item: pa.Field) -> pa.Array:
    """Input columns of JSONL may drift in type from row to row: what does not fit is null here, or its JSON text."""
    values = [row.get(item.name) for row in rows]
    if pa.types.is_struct(item.type):
        return pa.array(values, item.type)
    return pa.array([loose_value(value, item)[0] for value in values], item.type)

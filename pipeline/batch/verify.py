"""Recounting a finished output from its files alone: parts, receipts and totals, and nothing that does not belong."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from pipeline.batch.commit import JobOutput, stored_output
from pipeline.batch.layout import (
    ERRORS,
    FINGERPRINT_METADATA,
    MANIFEST,
    RETRY,
    SUCCESS,
    VIEWS,
    kind_of,
    part_name,
    receipt_name,
    row_errors_name,
    shard_of,
)
from pipeline.batch.manifest import manifest_of, success_of
from pipeline.batch.openai_lines import view_sizes
from pipeline.batch.plan import digest_of
from pipeline.batch.receipts import Receipt, in_threads, read_receipt, totals_of
from pipeline.batch.retry import read_plan
from pipeline.batch.row_errors import row_errors, row_errors_bytes
from pipeline.errors import OutputError
from pipeline.storage import Storage

_AT_ONCE = 256  # parts whose results are gathered together
_MAX_SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """Something in an output that is not as it should be.

    Args:
        where: The file, relative to the output folder.
        what: What is wrong with it.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}  {self.what}"


@dataclass(frozen=True)
class Verification:
    """What recounting an output found.

    Args:
        output: The folder.
        parts: Parts that were read.
        rows: Rows in them.
        errors: Rows with an error.
        error_codes: The same, by the error's code.
        prompt_tokens: Prompt tokens of all rows.
        completion_tokens: Generated tokens of all rows.
        bytes: Size of all parts.
        duplicate_ids: Rows whose id an earlier row has as well, where the job has an id column; that is the dataset's
            own business, and no problem. None without such a column.
        problems: Everything that is wrong; empty when the output is whole.
    """

    output: str
    parts: int
    rows: int
    errors: int
    error_codes: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int
    bytes: int
    duplicate_ids: int | None
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, ready for JSON."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        codes = ", ".join(f"{code} {count:,}" for code, count in sorted(self.error_codes.items()))
        table = {
            "output": self.output,
            "verified": "yes: all parts, receipts and totals agree"
            if self.ok
            else f"NO: {len(self.problems)} problems",
            "rows": f"{self.rows:,} in {self.parts:,} parts, {self.bytes:,} bytes",
            "errors": f"{self.errors:,}" + (f" ({codes})" if codes else ""),
            "tokens": f"{self.prompt_tokens:,} prompt, {self.completion_tokens:,} generated",
        }
        if self.duplicate_ids is not None:
            table["ids"] = f"{self.duplicate_ids:,} repeated" if self.duplicate_ids else "all different"
        lines = [f"{name:<8} {value}" for name, value in table.items()]
        lines += [f"  {problem}" for problem in self.problems[:_MAX_SHOWN]]
        more = len(self.problems) - _MAX_SHOWN
        return "\n".join([*lines, *([f"  and {more} more"] if more > 0 else [])])


@dataclass(frozen=True)
class _Part:
    """What reading one part told."""

    receipt: Receipt | None
    errors: bytes
    ids: npt.NDArray[np.uint64] | None
    problems: tuple[Problem, ...]
    view_sizes: tuple[int, int] = (0, 0)


def verify(storage: Storage) -> Verification:
    """Recount an output from its files alone.

    Each part is read whole and counted: rows, errors, tokens, bytes and digest must be those of its receipt; for
    Parquet, its footer must name the job's fingerprint. The manifest must be what the receipts give, `_SUCCESS` and
    `_errors.jsonl` what the manifest and the parts give; and there must be no other files. Of OpenAI batch files, the
    views must have the size of the lines they are made of. Nothing is written.

    Args:
        storage: The output folder.

    Returns:
        The counts and every problem; an output that is not finished is one.

    Raises:
        OutputError: The folder is not the output of a job, or cannot be read.
    """
    output = stored_output(storage)
    sizes = storage.list()
    problems = _misplaced(output, sizes)
    digest = digest_of(output.fingerprint)
    found: list[Receipt] = []
    errors = hashlib.sha256()
    view_bytes = [0, 0]
    ids: list[npt.NDArray[np.uint64]] = []
    there = [shard for shard in range(output.num_shards) if part_name(shard, output.kind) in sizes]
    for start in range(0, len(there), _AT_ONCE):
        for part in in_threads(lambda shard: _read(output, shard, sizes, digest), there[start : start + _AT_ONCE]):
            problems += part.problems
            errors.update(part.errors)
            for place, size in enumerate(part.view_sizes):
                view_bytes[place] += size
            if part.receipt is not None:
                found.append(part.receipt)
            if part.ids is not None:
                ids.append(part.ids)
    if len(found) == output.num_shards:
        problems += _wrong_totals(output, sizes, found, errors.hexdigest())
        problems += _wrong_views(output, sizes, view_bytes)
    totals = totals_of(found)
    return Verification(
        output=storage.url(""),
        parts=len(found),
        **totals,
        duplicate_ids=_repeated(ids) if output.id_column is not None else None,
        problems=tuple(problems),
    )


def _misplaced(output: JobOutput, sizes: Mapping[str, int]) -> list[Problem]:
    """Files that are missing, or that do not belong."""
    views = VIEWS if output.kind == "openai" else ()
    strange = [name for name in sizes if kind_of(name) is None or (kind_of(name) == "view" and name not in views)]
    problems = [Problem(name, "is no file of a job") for name in strange]
    for name in sizes:
        shard = shard_of(name, "part")
        if shard is not None and (shard >= output.num_shards or name != part_name(shard, output.kind)):
            problems.append(Problem(name, "is not a part of this job"))
        receipt = shard_of(name, "receipt")
        if receipt is not None and part_name(receipt, output.kind) not in sizes:
            problems.append(Problem(name, "has no part"))
    missing = [shard for shard in range(output.num_shards) if part_name(shard, output.kind) not in sizes]
    if missing:
        some = ", ".join(str(shard) for shard in missing[:8]) + (", ..." if len(missing) > 8 else "")
        problems.append(
            Problem("", f"{len(missing)} of {output.num_shards} shards are not there: {some}; run the job again")
        )
    problems += [Problem(name, "is missing") for name in (MANIFEST, SUCCESS, ERRORS, *views) if name not in sizes]
    try:
        plan = read_plan(output.storage)
        if plan is not None and (SUCCESS not in sizes or output.sealed() is None):
            problems.append(Problem(RETRY, "rows with an error are being answered again; run the job again"))
    except OutputError as error:
        problems.append(Problem(RETRY, error.message))
    return problems


def _read(output: JobOutput, shard: int, sizes: Mapping[str, int], digest: str) -> _Part:
    name = part_name(shard, output.kind)
    try:
        data = output.storage.read(name)
        counted = output.receipt_of(shard, data)
        errors = row_errors(data, output.kind, shard, prefix=output.prefix, id_column=output.id_column)
    except OutputError as error:
        return _Part(None, b"", None, (Problem(name, error.message),))
    lines = row_errors_bytes(errors)
    problems: list[Problem] = []
    if output.kind == "parquet":
        problems += _footer_problems(name, data, digest)
    if receipt_name(shard) not in sizes:
        problems.append(Problem(name, f"has no receipt {receipt_name(shard)}"))
    else:
        problems += _receipt_problems(output, shard, counted)
    listed = row_errors_name(shard, counted.sha256)
    if errors and (listed not in sizes or output.storage.read(listed) != lines):
        problems.append(Problem(listed, "is not the list of the part's errors"))
    views = view_sizes(data) if output.kind == "openai" else (0, 0)
    return _Part(counted, lines, _id_hashes(output, data), tuple(problems), views)


def _receipt_problems(output: JobOutput, shard: int, counted: Receipt) -> list[Problem]:
    name = receipt_name(shard)
    try:
        receipt = read_receipt(output.storage, shard)
    except OutputError as error:
        return [Problem(name, error.message)]
    return [
        Problem(name, f"says {item.name} {said!r:.80}, {counted.path} has {has!r:.80}")
        for item in fields(Receipt)
        if (said := getattr(receipt, item.name)) != (has := getattr(counted, item.name))
    ]


def _footer_problems(name: str, data: bytes, digest: str) -> list[Problem]:
    metadata = pq.read_metadata(io.BytesIO(data)).metadata or {}
    said = metadata.get(FINGERPRINT_METADATA.encode(), b"").decode(errors="replace")
    return [] if said == digest else [Problem(name, f"was written by a job with the fingerprint {said or 'none'}")]


def _wrong_views(output: JobOutput, sizes: Mapping[str, int], wanted: Sequence[int]) -> list[Problem]:
    if output.kind != "openai":
        return []
    return [
        Problem(name, f"has {sizes[name]:,} bytes, its lines in the parts {size:,}")
        for name, size in zip(VIEWS, wanted, strict=True)
        if name in sizes and sizes[name] != size
    ]


def _wrong_totals(
    output: JobOutput, sizes: Mapping[str, int], found: list[Receipt], errors_digest: str
) -> list[Problem]:
    storage = output.storage
    problems: list[Problem] = []
    if ERRORS in sizes and hashlib.sha256(storage.read(ERRORS)).hexdigest() != errors_digest:
        problems.append(Problem(ERRORS, "is not the list of all errors"))
    if MANIFEST not in sizes:
        return problems
    data = storage.read(MANIFEST)
    if SUCCESS in sizes and storage.read(SUCCESS) != success_of(data):
        problems.append(Problem(SUCCESS, f"was not written for this {MANIFEST}"))
    try:
        said = json.loads(data)
    except ValueError as error:
        return [*problems, Problem(MANIFEST, f"is damaged: {error}")]
    wanted = manifest_of(output, found)
    if not isinstance(said, dict):
        return [*problems, Problem(MANIFEST, "is damaged: it is not an object")]
    for name in wanted.keys() | (said.keys() - {"retry"}):
        if said.get(name) != wanted.get(name):
            says = f"says {name} {said.get(name)!r:.80}, the parts have {wanted.get(name)!r:.80}"
            problems.append(Problem(MANIFEST, "lists other parts" if name == "parts" else says))
    return problems


def _id_hashes(output: JobOutput, data: bytes) -> npt.NDArray[np.uint64] | None:
    """A number for each id: ids of a hundred million rows fit into memory that way."""
    column = output.id_column
    if column is None:
        return None
    if output.kind == "parquet":
        file = pq.ParquetFile(io.BytesIO(data))
        values = file.read(columns=[column])[column] if column in file.schema_arrow.names else []
        texts = [str(value) for value in values]
    else:
        texts = [json.dumps(json.loads(line).get(column), sort_keys=True) for line in data.splitlines()]
    return np.array(
        [int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") for text in texts], np.uint64
    )


def _repeated(hashes: list[npt.NDArray[np.uint64]]) -> int:
    everything = np.concatenate(hashes) if hashes else np.array([], np.uint64)
    return int(everything.size - np.unique(everything).size)

"""The lines of OpenAI batch files: what asks, what answers, and the two files that a finished job leaves.

In:  {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions" | "/v1/completions", "body": {...}}
Out: {"id": ..., "custom_id": ..., "response": {"status_code", "request_id", "body"}, "error": null}

A part has a line for every line of its shard, in order, answered or not: so it is committed in one step, like any part.
The two files that OpenAI's API gives are views of the parts, made when all are committed.

Source: the request input and request output objects of OpenAI's Batch API.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.batch.rows import Row
from pipeline.errors import InvalidRequestError, OutputError, UnknownRouteError
from pipeline.openai_api.http_errors import HttpError
from pipeline.openai_api.protocol import ROUTES, Kind
from pipeline.openai_api.responses import ID_PREFIXES, json_bytes
from pipeline.storage.filesystems import translated

if TYPE_CHECKING:
    from pipeline.batch.receipts import Receipt
    from pipeline.storage import Storage

RESULTS, ERRORS = "results.jsonl", "errors.jsonl"
ANSWERED = 200
PART_SCHEMA = pa.schema(
    [("id", pa.string()), ("custom_id", pa.string()), ("status_code", pa.int64()), ("body", pa.string())]
)
"""A part as a table; `body` is JSON."""

_METHOD = "POST"
_SPACE_HINT = "See that the folder for temporary files (TMPDIR) has room, and run the same command again."


@dataclass(frozen=True)
class LineIds:
    """What a line's answer is called. The same line of the same job is always called the same.

    Args:
        line: `id` of the result line.
        request: `request_id` of its response.
        digits: What all of a line's ids end with.
    """

    line: str
    request: str
    digits: str

    @classmethod
    def of(cls, fingerprint: str, identity: str) -> "LineIds":
        """The ids of a line.

        Args:
            fingerprint: The digest of the job's.
            identity: The row's; two lines of one `custom_id` are two rows.
        """
        digits = hashlib.sha256(f"{fingerprint}\n{identity}".encode()).hexdigest()[:32]
        return cls(f"batch_req_{digits}", f"req_{digits}", digits)

    def answer(self, kind: Kind) -> str:
        """`id` of the answer itself."""
        return ID_PREFIXES[kind] + self.digits


def read_custom_id(row: Row) -> str:
    """What a line wants its answer to be known by.

    Raises:
        InvalidRequestError: It has none, or one that is no text.
    """
    custom_id = row.values.get("custom_id")
    if custom_id is None:
        raise InvalidRequestError(f"the line at {row.identity} has no custom_id", hint="Give each line one of its own.")
    if not isinstance(custom_id, str) or not custom_id:
        raise InvalidRequestError(
            f"the custom_id of the line at {row.identity} is not a text, or empty", hint='Give a text: "request-1".'
        )
    return custom_id


def read_request(row: Row) -> tuple[Kind, Mapping[str, Any]]:
    """What a line asks: the kind of its route, and a body for it. Keys of the line that the format lacks are not read.

    Raises:
        UnknownRouteError: Nothing is answered at its URL.
        InvalidRequestError: Its method is not POST, or it has no body.
    """
    method, url, body = (row.values.get(name) for name in ("method", "url", "body"))
    if method != _METHOD:
        raise InvalidRequestError(f"the line's method is {_shown(method)}", hint=f'Give "{_METHOD}".')
    kind = ROUTES.get(url) if isinstance(url, str) else None
    if kind is None:
        raise UnknownRouteError(f"the line's url is {_shown(url)}", hint=f"Give {' or '.join(ROUTES)}.")
    if not isinstance(body, dict):
        raise InvalidRequestError("the line's body is missing, or is no object", hint="Give what is to be posted.")
    return kind, body


def result_line(ids: LineIds, custom_id: str, content: Mapping[str, Any]) -> bytes:
    """The line of an answer.

    Args:
        ids: What it is called.
        custom_id: From the line that asked.
        content: A chat.completion or text_completion object.
    """
    return _line(ids, custom_id, ANSWERED, content)


def error_line(ids: LineIds, custom_id: str | None, error: HttpError) -> bytes:
    """The line of a request that is not answered: what would be an HTTP error online.

    Args:
        ids: What it is called.
        custom_id: From the line that asked; None where it gave none.
        error: As a client would get it.
    """
    return _line(ids, custom_id, error.status, error.content)


def line_counts(line: bytes) -> tuple[dict[str, str] | None, int, int]:
    """Of a line of a part: its error, if it is one, and the tokens of its prompt and its answers.

    Raises:
        ValueError, KeyError, TypeError: It is no such line.
    """
    response = json.loads(line)["response"]
    if response["status_code"] != ANSWERED:
        error = response["body"]["error"]
        return {"code": error["code"], "message": error["message"]}, 0, 0
    usage = response["body"]["usage"]
    return None, usage["prompt_tokens"], usage["completion_tokens"]


def line_finish_reason(line: bytes) -> str:
    """Why the first answer of a result line ended.

    Raises:
        ValueError, LookupError, TypeError: It is no such line.
    """
    return str(json.loads(line)["response"]["body"]["choices"][0]["finish_reason"])


def part_table(data: bytes) -> pa.Table:
    """A part as a table of `PART_SCHEMA`.

    Raises:
        ValueError, KeyError, TypeError: It is no such part.
    """
    lines = [json.loads(line) for line in data.splitlines()]
    columns = [
        [line["id"] for line in lines],
        [line["custom_id"] for line in lines],
        [line["response"]["status_code"] for line in lines],
        [json_bytes(line["response"]["body"]).decode() for line in lines],
    ]
    return pa.table(
        [pa.array(values, item.type) for values, item in zip(columns, PART_SCHEMA, strict=True)], PART_SCHEMA
    )


def write_views(storage: "Storage", receipts: Iterable["Receipt"]) -> None:
    """Write all results into one file and all errors into another, in the order of the input, anew if they are there.

    Args:
        storage: The output folder.
        receipts: Of all parts, in order. A part that is of one sort only is copied as it is, or passed over.

    A temporary file gathers each: it may be larger than memory, and has to appear whole.

    Raises:
        OutputError: A part cannot be read, or a file cannot be written.
    """
    parts = list(receipts)
    for name, wants_errors in ((RESULTS, False), (ERRORS, True)):
        storage.remove([name])
        with (
            translated(f"{name} cannot be gathered", OutputError, hint=_SPACE_HINT),
            tempfile.NamedTemporaryFile(prefix="expert-view-") as file,
        ):
            file.writelines(_view(storage, parts, wants_errors=wants_errors))
            file.flush()
            storage.create_from_file(name, file.name)


def view_sizes(data: bytes) -> tuple[int, int]:
    """How many bytes of a part are in the view of results, and how many in that of errors.

    Raises:
        ValueError, KeyError, TypeError: It is no such part.
    """
    num_errors = sum(len(line) for line in data.splitlines(keepends=True) if line_counts(line)[0] is not None)
    return len(data) - num_errors, num_errors


def _view(storage: "Storage", receipts: Iterable["Receipt"], *, wants_errors: bool) -> Iterator[bytes]:
    for receipt in receipts:
        num_wanted = receipt.errors if wants_errors else receipt.rows - receipt.errors
        if num_wanted == receipt.rows:
            yield storage.read(receipt.path)
        elif num_wanted:
            lines = storage.read(receipt.path).splitlines(keepends=True)
            try:
                yield b"".join(line for line in lines if (line_counts(line)[0] is not None) is wants_errors)
            except (ValueError, KeyError, TypeError) as error:
                raise OutputError(
                    f"{storage.url(receipt.path)} is damaged: {error!r:.200}",
                    hint="Delete the part and its receipt, and run the same command again.",
                ) from error


def _line(ids: LineIds, custom_id: str | None, status: int, body: Mapping[str, Any]) -> bytes:
    response = {"status_code": status, "request_id": ids.request, "body": body}
    return json_bytes({"id": ids.line, "custom_id": custom_id, "response": response, "error": None}) + b"\n"


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    return repr(value[:100]) if isinstance(value, str) else "not a text"

"""Arrow extension types in what a stranger wrote: taken out before pyarrow looks, and refused.

pyarrow runs the code registered for an extension type as soon as it reads a schema that names one, which opening a file
does. Writing another key over the marker turns extension types into their storage types, with a field metadata that
tells them.
"""

import base64
from collections.abc import Iterator

import pyarrow as pa

from pipeline.errors import DatasetError

_MARKER = b"ARROW:extension:name"
_DEFUSED = b"ARROW:extensi_n:name"


def defused(data: bytes) -> bytes:
    """As many bytes of a schema or a footer, without extension types; also in base64, as Parquet keeps a schema."""
    for shift in range(3):
        data = data.replace(_base64_core(_MARKER, shift), _base64_core(_DEFUSED, shift))
    return data.replace(_MARKER, _DEFUSED)


def refuse_extensions(schema: pa.Schema, name: str) -> None:
    """Refuse a schema that had extension types, at any depth, before it was defused.

    Args:
        schema: Read from bytes that went through `defused`.
        name: The file, for the message.

    Raises:
        DatasetError: Names the column and its extension type.
    """
    extension = next((path for field in schema for path in _extensions(field)), None)
    if extension is not None:
        raise DatasetError(
            f"{name} has a column of an extension type",
            details=[f"column {extension}"],
            hint="Extension types are not read, for they can run code. Write the column as its plain type.",
        )


def _base64_core(text: bytes, shift: int) -> bytes:
    """The characters that tell `text` in base64, whatever stands around it, when it begins at byte `shift` of three."""
    encoded = base64.b64encode(b"\0" * shift + text).rstrip(b"=")
    return encoded[(0, 2, 3)[shift] : len(encoded) - ((shift + len(text)) % 3 > 0)]


def _extensions(field: pa.Field, path: str = "") -> Iterator[str]:
    here = f"{path}.{field.name}" if path else repr(field.name)
    marker = (field.metadata or {}).get(_DEFUSED)
    if marker is not None:
        yield f"{here}  {marker.decode(errors='replace')}"
    kind = field.type
    for index in range(kind.num_fields):
        yield from _extensions(kind.field(index), here)

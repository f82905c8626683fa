"""What several tests of the batch room need."""

from collections.abc import Iterator

import pyarrow as pa
import pytest


class Trap(pa.ExtensionType):
    """An extension type that tells when its code is run."""

    runs: list[bytes] = []  # noqa: RUF012 - Arrow makes its own instances; they all tell it here

    def __init__(self) -> None:
        super().__init__(pa.string(), "test.trap")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"payload"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "Trap":
        cls.runs.append(serialized)
        return cls()


@pytest.fixture
def trap() -> Iterator[pa.ExtensionArray]:
    """Two values of an extension type whose `type.runs` lists each time its code ran."""
    pa.register_extension_type(Trap())
    Trap.runs.clear()
    yield pa.ExtensionArray.from_storage(Trap(), pa.array(["x", "y"]))
    pa.unregister_extension_type("test.trap")

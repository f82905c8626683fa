"""Values of input columns as JSON, or in a column whose type the first lines of the input decided."""

import base64
import math
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.types as types

from pipeline.batch.jsonl_files import json_text
from pipeline.batch.shards import JSON_TEXT

_EXACT = 1 << 53


def json_value(value: Any) -> Any:
    """A value of an input column as JSON can hold it.

    Bytes become base64, NaN and infinite numbers the strings `NaN`, `Infinity` and `-Infinity`, dates and times ISO
    8601, durations seconds as text, decimals their digits as text; maps (lists of pairs) stay lists of pairs.

    Source: the JSON mapping of Protocol Buffers, for what JSON lacks.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _not_finite(value)
    if isinstance(value, Mapping):
        return {str(key): json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(inner) for inner in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return f"{value.total_seconds()}s"
    return str(value) if isinstance(value, Decimal) else repr(value)


def loose_value(value: Any, column: pa.Field) -> tuple[Any, bool]:
    """A JSON value as a column can hold it, and whether it fits.

    A string column holds another value's JSON text; elsewhere a value that does not fit becomes null.

    Args:
        value: From a line of JSON.
        column: A field of `jsonl_files.sampled_schema`.
    """
    if value is None:
        return None, True
    if column.metadata == JSON_TEXT:
        return json_text(value), True
    if types.is_string(column.type):
        return (value if isinstance(value, str) else json_text(value)), True
    if types.is_boolean(column.type):
        fits = isinstance(value, bool)
    elif types.is_int64(column.type):
        fits = isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63
    else:
        is_float = isinstance(value, float)
        fits = is_float or (isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _EXACT)
    return (value if fits else None), fits


def _not_finite(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"

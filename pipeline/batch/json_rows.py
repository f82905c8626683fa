"""The JSON of rows: strict, as everything is that a stranger wrote."""

from pipeline.engine.strict_json import MAX_DEPTH, is_utf8, parse_object
from pipeline.engine.strict_json import InvalidJsonError as InvalidRowError

__all__ = ["MAX_DEPTH", "InvalidRowError", "is_utf8", "parse_object"]

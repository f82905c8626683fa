"""The playground: static files that hold no data; the page calls the same API as every other client."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

_FOLDER = Path(__file__).parent
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}

HEADERS: Mapping[str, str] = MappingProxyType(
    {
        # Nothing from elsewhere, nothing inline, and no text may become markup: an answer is shown, never interpreted.
        "Content-Security-Policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
            "require-trusted-types-for 'script'; trusted-types 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
)
"""What every answer with one of these files carries."""


@dataclass(frozen=True)
class StaticFile:
    """One file of the page."""

    content: bytes
    media_type: str


def static_files() -> dict[str, StaticFile]:
    """The files by the path they are served under: the page itself under `/`, what it needs under `/playground/`.

    The page names everything relative to itself, the API too, so that it also works below a path prefix.
    """
    files = {
        f"/playground/{file.name}": StaticFile(file.read_bytes(), _MEDIA_TYPES[file.suffix])
        for file in sorted(_FOLDER.iterdir())
        if file.suffix in _MEDIA_TYPES
    }
    return {"/": files.pop("/playground/index.html"), **files}

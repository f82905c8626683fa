from collections.abc import Callable
from pathlib import Path

import pytest

from tests.package.expert_fixtures import expert_files, write_archive, write_files


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_cache_of_the_user(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERT_CACHE_DIR", str(cache))


@pytest.fixture
def expert_dir(tmp_path: Path) -> Callable[..., Path]:
    """Writes a valid unpacked package; keywords replace or drop (None) files, `a__b` for `a.b`."""

    def write(**changes: bytes | None) -> Path:
        return write_files(tmp_path / "expert", expert_files(**changes))

    return write


@pytest.fixture
def expert_file(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "test.expert")

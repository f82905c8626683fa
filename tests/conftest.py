"""What every test gets: no network, a cache of its own, and the demo experts."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.profiles import load_profile

load_profile()

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session", autouse=True)
def package_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Packages are unpacked into a folder of this test run, never into the user's cache."""
    folder = tmp_path_factory.mktemp("expert-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERT_CACHE_DIR", str(folder))
        yield folder

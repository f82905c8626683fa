"""One expert for the tests of all integrations."""

from collections.abc import Iterator

import pytest

from pipeline import Expert, demo


@pytest.fixture(scope="session")
def expert() -> Iterator[Expert]:
    with Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL, device="cpu") as loaded:
        yield loaded

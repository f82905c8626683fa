"""One Serve on the tests' own cluster, for all tests of this folder; what it serves, each module says."""

from collections.abc import Iterator

import pytest

from tests.e2e.serving import Service, serving


@pytest.fixture(scope="package")
def shared_service(cluster: None) -> Iterator[Service]:
    with serving("tests") as service:
        yield service

"""Fixtures of the sandbox."""

import pytest
from programs import leaving_nothing


@pytest.fixture
def nothing_left(tmp_path_factory):
    with leaving_nothing(tmp_path_factory.mktemp("programs")):
        yield

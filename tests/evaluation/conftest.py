"""Fixtures of the sandbox."""

import pytest
from programs import leaving_nothing

from diffusion_t5x.evaluation.code import execution as code_execution


@pytest.fixture(scope="session")
def isolation():
    if not code_execution.protections().isolation:
        pytest.skip(f"no isolation on this machine: {code_execution.protections().reason}")


@pytest.fixture
def nothing_left(tmp_path_factory):
    with leaving_nothing(tmp_path_factory.mktemp("programs")):
        yield

"""The backends to test: whichever have a kernel for the operation in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from numerics import backends_of

from fastprompt.ops import dispatch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `backend` says in its module's OPERATION whose backends those are."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backends_of(metafunc.module.OPERATION), indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Serve every operation of the test by this backend, backward included."""
    with dispatch.use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend: str) -> str:
    """Where the backend's tensors live; Triton's interpreter takes those of the CPU."""
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No graphs of other tests, neither before nor after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()

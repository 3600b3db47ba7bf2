"""The backends to test: whichever have a kernel for the operation in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from numerics import backends_of, dtypes_of

from fastprompt.ops import dispatch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "grid: a product of many cases; slow where Triton's interpreter runs it"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize `backend` by the backends of the module's OPERATION, all but those in its WITHOUT.

    Or `operation` and `backend` by the module's OPERATIONS. The interpreter takes a hundred times longer than eager: it
    runs the grids only with the slow tests, and beside them cases chosen to reach each path of the kernels.
    """
    if "backend" in metafunc.fixturenames:
        without = getattr(metafunc.module, "WITHOUT", ())
        several = "operation" in metafunc.fixturenames
        grid = metafunc.definition.get_closest_marker("grid") is not None
        params = []
        for operation in metafunc.module.OPERATIONS if several else (metafunc.module.OPERATION,):
            for name in backends_of(operation):
                slow = name == "triton" and grid and not torch.cuda.is_available()
                values = (operation, name) if several else (name,)
                if name not in without:
                    params.append(pytest.param(*values, marks=[pytest.mark.slow] if slow else []))
        metafunc.parametrize("operation, backend" if several else "backend", params, indirect=["backend"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a backend does not compute in: a test of each such refusal is enough."""
    refused = []
    for item in items:
        given = (
            item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        )
        if "backend" in given and given.get("dtype", torch.float32) not in dtypes_of(given["backend"]):
            refused.append(item)
    if refused:
        config.hook.pytest_deselected(items=refused)
        items[:] = [item for item in items if item not in set(refused)]


@pytest.fixture
def widest(backend: str) -> torch.dtype:
    """The widest dtype that the backend computes in."""
    return dtypes_of(backend)[0]


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

"""Every test draws its own random numbers, the same in every run, and may poison the memory it is given."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import hypothesis
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores
if not torch.cuda.is_available():
    # Read when the kernels are imported: without a GPU, the backend `triton` is their interpretation on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["FASTPROMPT_PROFILE"] = "none"  # whatever was measured on this machine

# The same examples in every run: a few here, more in CI.
hypothesis.settings.register_profile("few", max_examples=8, deadline=None, derandomize=True)
hypothesis.settings.register_profile("many", max_examples=30, deadline=None, derandomize=True)
hypothesis.settings.load_profile("many" if os.environ.get("CI") else "few")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed torch from the test's own id, so that no test depends on the order; TEST_SEED=1 draws other numbers."""
    value = zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("TEST_SEED", "0"))
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run on one thread: small models are far slower on two busy ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Let `torch.empty` hand out NaN: an element that a kernel forgets to write shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])

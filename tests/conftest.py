"""One thread a test, no CUDA tests where there is no device, and tests that share a fixture kept on one worker."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest

# Before torch is imported, here and in the processes that tests start. Maps as small as those of tests gain nothing
# from a second thread, and wait long for it where another worker has the core. A test that needs threads asks for them.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

# Autograd starts its threads at its first backward. If that is one of fake tensors, as exporting makes them, a process
# that is forked from this one can take no gradients any more.
torch.ones(1, requires_grad=True).sum().backward()

# `make test-fast` leaves these out, and tests that are marked themselves: they train, compile, interpret kernels, build
# large models or start processes.
SLOW = re.compile(
    r"tests/tasks/|tests/ops/triton/|tests/ops/cpu/.*environment|tests/diffusers/test_(mounted|adapter)|tests/bench/"
    r"|tests/cli/test_(bench|classify|explain|models|spread)|analysis/.*cost|tests/test_packaging"
    r"|tests/models/(test_denoiser|test_learning|test_weights|test_contract.*(tiny|small|base))"
)


def _shared_by(item: pytest.Item) -> str | None:
    """The folder or file whose fixture, made once for all of its tests, this one uses."""
    fixtures = getattr(item, "_fixtureinfo", None)
    definitions = [d for ds in fixtures.name2fixturedefs.values() for d in ds] if fixtures else []
    shared = {d.scope: d.baseid for d in definitions if d.scope != "function" and d.baseid.startswith("tests")}
    return next((shared[scope] for scope in ("session", "package", "module", "class") if scope in shared), None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
    cuda = torch.cuda.is_available()
    for item in items:
        if "cuda" in item.keywords and not cuda:
            item.add_marker(skip)
        if SLOW.search(item.nodeid):
            item.add_marker("slow")
        if group := _shared_by(item):
            item.add_marker(pytest.mark.xdist_group(group))
    if "PYTEST_XDIST_WORKER" in os.environ:
        # The slow ones first, so that no worker is left with one at the end.
        items.sort(key=lambda item: "slow" not in item.keywords)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Every test runs on one thread, and leaves no other number behind, as the commands' ``--threads`` would."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)

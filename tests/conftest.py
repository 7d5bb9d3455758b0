"""CUDA tests are skipped, with the reason, where there is no device; small networks run on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Folders whose tests all run on one thread.
_ON_ONE_THREAD = [Path(__file__).parent / name for name in ("diffusers", "nn", "tasks")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Maps as small as those of tests gain nothing from a second thread, and wait long for it where cores are taken."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves another number of threads behind, as the commands' ``--threads`` would."""
    threads = torch.get_num_threads()
    if any(folder in request.path.parents for folder in _ON_ONE_THREAD):
        request.getfixturevalue("one_thread")
    yield
    torch.set_num_threads(threads)

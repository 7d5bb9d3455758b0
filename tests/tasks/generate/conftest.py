from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm", reason="needs gspn[train]")
pytest.importorskip("accelerate", reason="needs gspn[train]")
pytest.importorskip("diffusers", reason="needs gspn[diffusers]")


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums of as many threads are the same sums; and two workers of a small machine do not wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

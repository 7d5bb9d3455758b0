"""The layers of the mixer beside GSPN2d."""

from __future__ import annotations

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm

from gspn.nn.mixer import ResponseNorm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_response_norm_is_timms(dtype) -> None:
    torch.manual_seed(0)
    ours, theirs = (norm(6, channels_last=False).to(dtype) for norm in (ResponseNorm, GlobalResponseNorm))
    torch.nn.init.normal_(ours.weight)
    torch.nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 5, 7, dtype=dtype)
    x[:, 2] = 0  # a channel that says nothing has a norm of 0 and no gradient through it
    x.requires_grad_()
    weight = torch.randn(2, 6, 5, 7, dtype=dtype)
    torch.testing.assert_close(ours(x), theirs(x))
    actual, expected = (torch.autograd.grad((norm(x) * weight).sum(), x)[0] for norm in (ours, theirs))
    torch.testing.assert_close(actual, expected)

"""``GSPNMixer`` and ``GSPNBlock``: what they are made of, and what training does to them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gspn.nn import GSPNBlock, GSPNMixer


def test_the_mixer_is_its_parts() -> None:
    torch.manual_seed(0)
    mixer = GSPNMixer(6, proxy_dim=3, groups=1, expand_ratio=1.5, kernel_size=5, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (mixer.grn.weight, mixer.grn.bias, mixer.norm.weight, mixer.norm.bias):
            parameter.uniform_(0.5, 2)
    x = torch.randn(2, 6, 5, 8, dtype=torch.float64)

    t = torch.einsum("cd,bdhw->bchw", mixer.in_proj.weight[:, :, 0, 0], x)
    assert t.shape[1] == 9
    t = F.conv2d(t, mixer.conv_dw.weight, padding=2, groups=9)
    t = mixer.gspn(t)
    mean, var = t.mean(1, keepdim=True), t.var(1, keepdim=True, correction=0)
    t = (t - mean) / (var + 1e-5).sqrt() * mixer.norm.weight.view(-1, 1, 1) + mixer.norm.bias.view(-1, 1, 1)
    response = t.square().sum((2, 3), keepdim=True).sqrt()
    relative = response / (response.mean(1, keepdim=True) + 1e-6)
    t = t + mixer.grn.weight.view(-1, 1, 1) * t * relative + mixer.grn.bias.view(-1, 1, 1)
    t = torch.einsum("dc,bchw->bdhw", mixer.out_proj.weight[:, :, 0, 0], t)
    torch.testing.assert_close(mixer(x), t)


def test_the_mixer_refuses_even_kernels_and_unknown_options() -> None:
    with pytest.raises(ValueError, match="kernel_size=4 must be odd"):
        GSPNMixer(8, kernel_size=4)
    with pytest.raises(TypeError, match="proxy"):
        GSPNMixer(8, proxy=4)
    with pytest.raises(ValueError, match="groups=5 does not divide dim=12"):
        GSPNMixer(8, groups=5)


@pytest.mark.parametrize("lpu", [True, False])
@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_the_block_is_its_parts(lpu, layer_scale) -> None:
    torch.manual_seed(0)
    block = GSPNBlock(6, proxy_dim=2, lpu=lpu, layer_scale=layer_scale, mlp_ratio=2, dtype=torch.float64)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    factor = 1 if layer_scale is None else layer_scale

    def local(unit: nn.Module, t: torch.Tensor) -> torch.Tensor:
        return t + F.conv2d(t, unit.conv_dw.weight, unit.conv_dw.bias, padding=1, groups=6) if lpu else t

    t = local(block.lpu1, x)
    t = t + factor * block.mixer(F.layer_norm(t.movedim(1, -1), (6,)).movedim(-1, 1))
    t = local(block.lpu2, t)
    hidden = F.conv2d(F.layer_norm(t.movedim(1, -1), (6,)).movedim(-1, 1), block.mlp.fc1.weight, block.mlp.fc1.bias)
    assert hidden.shape[1] == 12
    t = t + factor * F.conv2d(F.gelu(hidden), block.mlp.fc2.weight, block.mlp.fc2.bias)
    torch.testing.assert_close(block(x), t)


def test_layer_scale_is_learned_and_zero_silences_the_branches() -> None:
    block = GSPNBlock(6, layer_scale=0.0)
    x = torch.randn(2, 6, 5, 7)
    assert torch.equal(block(x), x)
    block(x).sum().backward()
    assert block.ls1.gamma.grad.ne(0).all() and block.ls2.gamma.grad.ne(0).all()


def test_drop_path_drops_samples_in_training_alone() -> None:
    torch.manual_seed(0)
    block = GSPNBlock(6, drop_path=0.5)
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)
    x = torch.randn(64, 6, 3, 3)
    branch = block.eval()(x) - x
    assert torch.equal(block(x), block(x))

    added = block.train()(x) - x
    dropped = added.flatten(1).abs().amax(1) == 0
    assert 16 < dropped.sum() < 48
    torch.testing.assert_close(added[~dropped], 2 * branch[~dropped], rtol=1e-4, atol=1e-5)

    always = GSPNBlock(6, drop_path=1.0, lpu=True)
    nn.init.zeros_(always.lpu1.conv_dw.weight)
    nn.init.zeros_(always.lpu1.conv_dw.bias)
    nn.init.zeros_(always.lpu2.conv_dw.weight)
    nn.init.zeros_(always.lpu2.conv_dw.bias)
    assert torch.equal(always(x), x)
    assert not torch.equal(always.eval()(x), x)


@pytest.mark.parametrize("lpu", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_sizes_layouts_and_gradients(lpu, memory_format) -> None:
    block = GSPNBlock(8, groups=1, lpu=lpu, layer_scale=1.0)
    nn.init.ones_(block.mixer.grn.weight)
    for height, width in [(1, 1), (1, 6), (5, 3), (8, 8)]:
        x = torch.randn(2, 8, height, width).contiguous(memory_format=memory_format)
        y = block(x)
        assert y.shape == x.shape
        assert y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y, block(x.contiguous()), rtol=1e-4, atol=1e-5)
        y.square().mean().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.ne(0).any(), name
    assert block(torch.zeros(0, 8, 4, 5)).shape == (0, 8, 4, 5)


def test_device_and_dtype_reach_every_part() -> None:
    block = GSPNBlock(8, lpu=True, layer_scale=1e-5, drop_path=0.1, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in block.parameters()} == {("meta", torch.bfloat16)}
    y = block(torch.empty(2, 8, 6, 5, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype) == ((2, 8, 6, 5), torch.bfloat16)


def test_half_precision_and_autocast() -> None:
    torch.manual_seed(0)
    block = GSPNBlock(16, lpu=True).eval()
    x = torch.randn(2, 16, 14, 14)
    exact = GSPNBlock(16, lpu=True, dtype=torch.float64).eval()
    exact.load_state_dict(block.state_dict())
    exact = exact(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = block(x)
    low = block.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16 and low.isfinite().all()
    assert (mixed.double() - exact).abs().max() <= 2 * (low.double() - exact).abs().max()

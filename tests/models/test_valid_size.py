"""Images of several sizes in a batch of a network: each gives what it gives alone, logits and gradients."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import gspn.models
from gspn.nn import GSPN2d, GSPNBlock, GSPNMixer, SelfAttention2d
from valid_size_cases import poisoned, random_sizes

SIZES = random_sizes(40, 21, 26)
FEW = [(21, 26), (1, 1), (9, 14), (21, 2)]


def images(sizes: list[tuple[int, int]]) -> Tensor:
    x = torch.randn(len(sizes), 3, 21, 26, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    padded = poisoned([x], sizes, float("nan"))[0]
    assert padded is not None
    return padded.requires_grad_()


def small(**options) -> nn.Module:
    torch.manual_seed(0)
    return gspn.models.GSPN(
        dims=(8, 12), depths=(1, 2), stem_stride=2, num_classes=5, segment=(3, None), dtype=torch.float64, **options
    ).train()


def check(model: nn.Module, sizes: list[tuple[int, int]], call=None) -> None:
    """The results of a batch, of images and of parameters, against those of each image alone."""
    call = call or (lambda x, valid_size: model(x, valid_size=valid_size))
    x = images(sizes)
    actual = call(x, torch.tensor(sizes))
    weight = torch.randn_like(actual)
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad((actual * weight).sum(), [x, *parameters.values()])
    expected = [torch.zeros_like(one) for one in grads]
    for i, (h, w) in enumerate(sizes):
        if not h * w:
            continue  # nothing to compute alone
        own = x[i : i + 1, :, :h, :w].detach().requires_grad_()
        result = call(own, None)
        torch.testing.assert_close(actual[i : i + 1], result)
        of_image, *others = torch.autograd.grad((result * weight[i : i + 1]).sum(), [own, *parameters.values()])
        expected[0][i : i + 1, :, :h, :w] = of_image
        for total, one in zip(expected[1:], others, strict=True):
            total += one
    for i, (h, w) in enumerate(sizes):
        if not h * w:  # the bias alone
            model.zero_grad()
            (call(x[i : i + 1].detach(), torch.tensor([(h, w)])) * weight[i : i + 1]).sum().backward()
            for total, parameter in zip(expected[1:], parameters.values(), strict=True):
                total += 0 if parameter.grad is None else parameter.grad
    for name, grad, one in zip(("x", *parameters), grads, expected, strict=True):
        torch.testing.assert_close(grad, one, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "options",
    [
        {"scan": {"groups": 1}},
        {"lpu": True, "layer_scale": 0.5, "scan": {"impl": "reference"}},
        {"global_pool": "max"},
    ],
    ids=str,
)
def test_a_batch_of_40_sizes_is_each_image_alone(options) -> None:
    check(small(**options), SIZES if options == {"scan": {"groups": 1}} else FEW)


def test_a_registered_model() -> None:
    model = timm.create_model("gspn_pico", num_classes=7).double().eval()
    check(model, FEW)


def test_checkpointed_blocks_and_the_layout_change_nothing() -> None:
    model = small()
    x, sizes = images(FEW), torch.tensor(FEW)
    plain = torch.autograd.grad(model(x, valid_size=sizes).sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    model.to(memory_format=torch.channels_last)
    again = torch.autograd.grad(
        model(x.to(memory_format=torch.channels_last), valid_size=FEW).sum(), list(model.parameters())
    )
    for actual, expected in zip(again, plain, strict=True):
        torch.testing.assert_close(actual, expected)


def test_features_are_those_of_each_image_alone() -> None:
    model = small()
    x = images(FEW)
    last, maps = model.forward_intermediates(x, norm=True, valid_size=FEW)
    torch.testing.assert_close(last, model.forward_features(x, FEW), equal_nan=True)
    for i, (h, w) in enumerate(FEW):
        _, own = model.forward_intermediates(x[i : i + 1, :, :h, :w], norm=True)
        for info, all_maps, one in zip(model.feature_info, maps, own, strict=True):
            height, width = -(-h // info["reduction"]), -(-w // info["reduction"])
            assert one.shape[-2:] == (height, width)
            torch.testing.assert_close(all_maps[i : i + 1, :, :height, :width], one)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GSPN2d(6, proxy_dim=3, groups=2, proxy_bias=True),
        lambda: SelfAttention2d(6),
        lambda: GSPNMixer(6, proxy_dim=2, groups=1),
        lambda: GSPNBlock(6, proxy_dim=2, lpu=True),
    ],
    ids=["GSPN2d", "SelfAttention2d", "GSPNMixer", "GSPNBlock"],
)
def test_modules(make) -> None:
    torch.manual_seed(0)
    module = make().double()
    x = torch.randn(4, 6, 7, 9, dtype=torch.float64)
    sizes = [(7, 9), (1, 1), (4, 5), (7, 1)]
    filled = poisoned([x], sizes, 1e3 if isinstance(module, GSPNMixer | GSPNBlock) else float("nan"))[0]
    result = module(filled, torch.tensor(sizes))
    for i, (h, w) in enumerate(sizes):
        torch.testing.assert_close(result[i : i + 1, :, :h, :w], module(x[i : i + 1, :, :h, :w]))
    if isinstance(module, GSPN2d | SelfAttention2d):
        assert torch.equal(result, poisoned([result], sizes, 0.0)[0])
    assert torch.equal(module(filled, sizes), result)
    with pytest.raises(ValueError, match=r"valid_size\[1\]=\(8, 1\) is not within the map of 7 x 9"):
        module(filled, [(7, 9), (8, 1), (4, 5), (7, 1)])


def test_what_depends_on_the_size_of_the_map_is_refused() -> None:
    x = images(FEW)
    for options, says in (
        ({"scan": {"reference_lines": 7}}, "reference_lines=7"),
        ({"scan": {"alignment": "official"}}, "alignment='official'"),
        ({"global_pool": "catavgmax"}, "global_pool='catavgmax'"),
    ):
        with pytest.raises(NotImplementedError, match=says):
            small(**options)(x, valid_size=FEW)
    with pytest.raises(ValueError, match="valid_size"):
        small()(x, valid_size=FEW[:2])
    with pytest.raises(TypeError, match="heights and widths are integers"):
        small().forward_head(torch.zeros(4, 12, 3, 3, dtype=torch.float64), valid_size=torch.ones(4, 2))


def test_a_trace_and_a_compiled_model_take_sizes() -> None:
    model = small().eval()
    x, sizes = images(FEW).detach(), torch.tensor(FEW)
    whole = x.nan_to_num()
    traced = torch.fx.symbolic_trace(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for call in (traced, compiled):
        torch.testing.assert_close(call(whole), model(whole))
        torch.testing.assert_close(call(x, sizes), model(x, valid_size=sizes))

"""UNets of diffusers over several processes, against the same on one: outputs, gradients, what is sent and kept."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("diffusers", reason="needs gspn[diffusers]")

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from diffusers_support import TEXT, make_unet
from distributed.rows_support import near_whole, over
from gspn.diffusers import GSPNAdapter
from gspn.distributed import ImageRows
from gspn.nn import GSPN2d

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distributed")]


def _predict(unet: Any, x: Tensor, text: Tensor, **conditions: Tensor) -> Tensor:
    given = {"added_cond_kwargs": conditions} if conditions else {}
    return unet(x, torch.tensor([10.0, 500.0], dtype=x.dtype), text, **given).sample


def _call(name: str, text: Tensor) -> Any:
    if name != "sdxl":
        return functools.partial(_predict, text=text)
    sizes = torch.tensor([[74, 34, 0, 0, 74, 34]] * 2).to(text)
    return functools.partial(_predict, text=text, text_embeds=torch.randn(2, 16).to(text), time_ids=sizes)


def check_forms(group: Any) -> None:
    """Uneven rows, of which some begin at odd ones at every level; some attention left; recomputed blocks."""
    for name, layers, (height, width), multiple, checkpoints in (
        ("sd15", None, (37, 17), 1, True), ("sdxl", ["down.1", "up"], (24, 18), 2, False),
        ("tiny", None, (16, 6), 4, False),
    ):  # fmt: skip
        unet = make_unet(name, layers_per_block=1, **{"transformer_layers_per_block": 1} if name == "sdxl" else {})
        if checkpoints:
            unet.enable_gradient_checkpointing()
        if name != "tiny":  # which keeps all of its attention
            adapter = GSPNAdapter.from_model(
                unet, layers=layers, reference_lines={"mid": 5} if layers is None else None
            )
            adapter.mount(unet)
        text = torch.randn(2, 5, TEXT, dtype=torch.float64)
        image = torch.randn(2, 4, height, width, dtype=torch.float64)
        near_whole(name, unet.double().train(), _call(name, text), image, group, multiple)


def check_half(group: Any) -> None:
    """bfloat16 stays bfloat16; statistics of norms are float32."""
    norm, rows = nn.GroupNorm(2, 8).bfloat16(), ImageRows(12, 5, group=group)
    x = (torch.randn(1, 8, 12, 5) * 3 + 50).bfloat16()
    with rows.applied(norm):
        actual = rows.gather(norm(rows.take(x)))
    assert actual.dtype == torch.bfloat16
    exact, plain = nn.functional.group_norm(x.double(), 2), norm(x)
    assert (actual.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()


def check_sent(group: Any) -> None:
    """The formula of docs/distributed.md, with the numbers of every layer from a call of the whole."""
    count, sent = dist.get_world_size(group), []
    plain = dist.all_to_all_single

    def counted(out: Tensor, given: Tensor, *rest: Any, **more: Any) -> Any:
        sent.append(given.numel())
        return plain(out, given, *rest, **more)

    unet = make_unet("sd15", layers_per_block=1).eval()
    GSPNAdapter.from_model(unet, layers=["down", "up"]).mount(unet)
    image, text = torch.randn(2, 4, 16 * count, 8), torch.randn(2, 5, TEXT)
    share, inner = (count - 1) / count, (dist.get_rank(group) > 0) + (dist.get_rank(group) < count - 1)
    formula = [0.0]

    def add(module: nn.Module, args: Any, kwargs: Any, _out: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        if isinstance(module, GSPN2d):
            pixels = x.shape[0] * x.shape[2] * x.shape[3]
            formula[0] += 2 * module.dim * pixels * share / count + module.proxy_dim * pixels * share
        elif isinstance(module, nn.GroupNorm):
            formula[0] += 2 * x.shape[0] * module.num_groups * (count - 1)
        elif isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            # A halo of one row for each neighbour; of two rows at a time, none is needed of those below.
            edges = inner if module.stride == (1, 1) else int(dist.get_rank(group) < count - 1)
            formula[0] += edges * x.shape[0] * x.shape[1] * x.shape[3]
        elif isinstance(module, Attention) and module.is_cross_attention is False and not _is_text(args, kwargs):
            formula[0] += x.numel() * share

    handles = [one.register_forward_hook(add, with_kwargs=True) for one in unet.modules()]
    with torch.no_grad():
        whole = _predict(unet, image, text)
        for one in handles:
            one.remove()
        rows = ImageRows(16 * count, 8, multiple=8, group=group)
        dist.all_to_all_single = counted
        try:
            with rows.applied(unet):
                part = _predict(unet, rows.take(image), text)
        finally:
            dist.all_to_all_single = plain
    torch.testing.assert_close(rows.gather(part), whole, rtol=1e-3, atol=1e-4)
    assert sum(sent) == 4 * formula[0]


def _is_text(args: Any, kwargs: Any) -> bool:
    return (len(args) > 1 and args[1] is not None) or kwargs.get("encoder_hidden_states") is not None


def check_memory(group: Any) -> None:
    """The peak of what is alive at once, as the estimates of `gspn t2i sample` follow it."""
    from gspn.tasks.text_to_image.sample.estimate import CostTracker

    count = dist.get_world_size(group)
    unet = make_unet("sd15", layers_per_block=1).eval()
    GSPNAdapter.from_model(unet).mount(unet)
    image, text, peaks = torch.randn(2, 4, 128, 64), torch.randn(2, 5, TEXT), []
    rows = ImageRows(128, 64, multiple=8, group=group)
    for part in (image, rows.take(image).clone()):
        with torch.no_grad(), CostTracker(torch.device("cpu")) as tracker:
            if part is image:
                _predict(unet, part, text)
            else:
                with rows.applied(unet):
                    _predict(unet, part, text)
        peaks.append(tracker.cost.peak_bytes)
    print("ratio to 1/R", peaks[1] * count / peaks[0], peaks)
    assert peaks[1] <= 1.15 * peaks[0] / count


def check_refusals(group: Any) -> None:
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.upsampling import Upsample2D

    rows = ImageRows(8, 6, group=group)
    image = rows.take(torch.zeros(1, 4, 8, 6))
    for module, words in (
        (Downsample2D(4, use_conv=True, padding=0), "use padding=1"),
        (Upsample2D(4, interpolate=False), "only the nearest pixels and a convolution"),
        (Upsample2D(4, use_conv=True), "whose sides the model's strides divide"),
        (Attention(4, heads=1, dim_head=4, norm_num_groups=2), "norms of its own or fused projections"),
    ):
        with pytest.raises(NotImplementedError, match=words), rows.applied(module):
            module(image)
    unet = make_unet("sd15", resnet_time_scale_shift="scale_shift", down_block_types=("AttnDownBlock2D",) * 4)
    with pytest.raises(NotImplementedError, match="AttnDownBlock2D, and it is not known"), rows.applied(unet):
        pass
    unet, few = make_unet(), ImageRows(2, 6, group=group)
    with pytest.raises(ValueError, match=r"leaves rank . of 2 no row; .* at least 2 x 2 = 4 rows"), few.applied(unet):
        _predict(unet, few.take(torch.zeros(2, 4, 2, 6)), torch.zeros(2, 5, TEXT))


@pytest.mark.parametrize("count", [2, 4])
def test_everything_is_as_on_one_process(count: int, tmp_path: Path) -> None:
    over(count, tmp_path, check_forms, check_half, check_sent, *([check_memory, check_refusals] if count == 2 else []))

"""One image over several processes, against the same on one: outputs, gradients, what is sent, and what is refused."""

from __future__ import annotations

import copy
import functools
import random
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import gspn
import gspn.models
from distributed.rows_support import average, near, near_whole, over
from gspn.distributed import ImageRows
from gspn.distributed.rows import Map
from gspn.models import GSPNDenoiser2DModel
from gspn.nn import GSPN2d, GSPNBlock, GSPNMixer
from gspn.nn.attention import SelfAttention2d
from tasks.processes import start_many

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distributed")]

FEATURES = dict(dims=(8, 12, 16), depths=(1, 1, 1), num_classes=5)


def check_propagate(group: Any) -> None:
    count = dist.get_world_size(group)
    for first in (True, *[False] * 6):
        batch, states, height, width = (random.randint(*one) for one in ((1, 2), (1, 9), (count, 13), (1, 9)))
        size = random.choice([1, 2, 3])
        channels = size * random.randint(-(-count // size), 5)
        groups = random.choice([1, channels // size, channels])
        if first:  # each process has parts of groups
            channels, groups, height, width, states = 9, 3, count + 3, 5, 4
        count_d = 4
        tensors = [
            torch.randn(shape, dtype=torch.float64)
            for shape in (
                (batch, channels, height, width), (batch, states, height, width), (count_d, groups, 3, states),
                (count_d, channels, states), (count_d, channels, states), (count_d, channels, states), (count_d,),
            )
        ]  # fmt: skip
        if random.random() < 0.5:
            tensors[5:] = []
        segment = None if first else random.choice([None, 1, 2, 5])
        weight = torch.randn_like(tensors[0])
        whole = [one.clone().requires_grad_() for one in tensors]
        y = gspn.propagate(*whole, segment=segment)  # type: ignore[arg-type]
        (y * weight).mean().backward()

        rows = ImageRows(height, width, group=group)
        own = [one.clone().requires_grad_() for one in tensors]
        part = rows.propagate(rows.take(own[0]), rows.take(own[1]), *own[2:], segment=segment)
        loss = rows.mean(part * rows.take(weight))
        near(loss, (y * weight).mean(), "loss")
        near(rows.gather(part), y, "y")
        loss.backward()
        for i, (one, expected) in enumerate(zip(average(own, group), whole, strict=True)):
            near(one, expected.grad, f"gradient of argument {i}, {tensors[0].shape}")  # type: ignore[arg-type]


def _models() -> list[tuple[str, nn.Module, Any]]:
    image = torch.randn(2, 3, 45, 38, dtype=torch.float64)
    small = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    noisy = torch.randn(2, 1, 22, 14, dtype=torch.float64)
    denoiser = GSPNDenoiser2DModel(
        sample_size=22, in_channels=1, num_class_embeds=10, dim=12, num_layers=2, patch_size=2
    )
    for one in denoiser.parameters():
        nn.init.normal_(one, std=0.1)
    labelled = functools.partial(_denoise, timestep=torch.tensor([3.0, 500.0]), class_labels=torch.tensor([1, 7]))
    return [
        ("mixer", GSPNMixer(6, reference_lines=5), (None, small)),
        ("propagation in segments", GSPN2d(6, segment=2, reference_lines=4, groups=1), (None, small)),
        ("block", GSPNBlock(6, drop_path=0.5), (None, small)),
        ("backbone", timm.create_model("gspn_pico", **FEATURES), (None, image)),
        ("backbone with checkpoints", timm.create_model("gspn_pico", **FEATURES, lpu=True), (None, image)),
        ("features", timm.create_model("gspn_pico", features_only=True, **FEATURES), (None, image)),
        ("denoiser", denoiser, (labelled, noisy)),
    ]


def _denoise(model: Any, x: Tensor, **rest: Any) -> Tensor:
    return model(x, rest["timestep"].to(x.dtype), rest["class_labels"]).sample


def check_models(group: Any) -> None:
    for name, model, (call, image) in _models():
        model = model.double().train()
        if "checkpoints" in name:
            model.set_grad_checkpointing()
        call = call or (lambda model, x: model(x))
        near_whole(name, model, call, image, group)


def check_autocast(group: Any) -> None:
    image = torch.randn(1, 6, 9, 7)
    mixer, rows = GSPNMixer(6), ImageRows(9, 7, group=group)
    with torch.autocast("cpu", torch.bfloat16):
        expected = mixer(image)
        with rows.applied(mixer):
            actual = rows.gather(mixer(rows.take(image)))
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.02, atol=0.02)


def check_sent(group: Any) -> None:
    count, sent = dist.get_world_size(group), []
    plain = dist.all_to_all_single

    def counted(out: Tensor, given: Tensor, *rest: Any, **more: Any) -> Any:
        sent.append(given.numel())
        return plain(out, given, *rest, **more)

    channels, states, height, width = 8, 4, 4 * count, 5
    scan, rows = GSPN2d(channels, proxy_dim=states), ImageRows(height, width, group=group)
    dist.all_to_all_single = counted
    try:
        with torch.no_grad(), rows.applied(scan):
            scan(rows.take(torch.randn(1, channels, height, width)))
    finally:
        dist.all_to_all_single = plain
    pixels = height * width
    formula = 2 * channels * pixels * (count - 1) / count**2 + states * pixels * (count - 1) / count
    assert sum(sent) == 4 * formula


def check_order(group: Any) -> None:
    """Rows are on their way while the proxy, or the middle of a convolution, is computed; gradients too."""
    events: list[str] = []
    plain, plain_conv = dist.all_to_all_single, F.conv2d

    class Work:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            events.append("wait")
            self.work.wait()

    def sent(*args: Any, **more: Any) -> Work:
        events.append("send")
        return Work(plain(*args, **more))

    def conv(*args: Any, **more: Any) -> Tensor:
        events.append("conv")
        return plain_conv(*args, **more)

    rows = ImageRows(16, 6, group=group)
    x = rows.take(torch.randn(1, 4, 16, 6)).clone().requires_grad_()
    inner = (dist.get_rank(group) > 0) + (dist.get_rank(group) < dist.get_world_size(group) - 1)
    dist.all_to_all_single, F.conv2d = sent, conv
    try:
        for module, forward, backward in (
            (GSPN2d(4), "send conv send wait wait send wait", "send wait send send wait wait"),
            (nn.Conv2d(4, 4, 3, padding=1), "send conv wait" + " conv" * inner, "send wait"),
        ):
            with rows.applied(module):
                y = module(x)
            assert events == forward.split()
            events.clear()
            y.sum().backward()
            assert events == backward.split()
            events.clear()
    finally:
        dist.all_to_all_single, F.conv2d = plain, plain_conv


def check_refusals(group: Any) -> None:
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    rows = ImageRows(8, 6, group=group)
    with pytest.raises(ValueError, match=rf"rank {rank} of {count}: \(1, 4, 3, 3\) is not a part of this image"):
        rows.gather(torch.zeros(1, 4, 3, 3))
    with pytest.raises(ValueError, match="these are the rows of images of 8x6"):
        rows.take(torch.zeros(1, 4, 8, 7))
    with pytest.raises(ValueError, match="multiple=0"):
        ImageRows(8, 6, multiple=0, group=group)
    others = dist.new_group([0])
    if rank:
        with pytest.raises(ValueError, match=f"rank {rank} is not in group"):
            ImageRows(8, 6, group=others)
    with pytest.raises(ValueError, match=f"use fewer processes, or an image of at least {count} x 1 = {count} rows"):
        ImageRows(count - 1, 6, group=group)
    with pytest.raises(ValueError, match="cannot tell them apart"):
        rows.add(Map((*range(0, 8, 8 // count), 9), 6))
    with pytest.raises(ValueError, match=f"1 channels for {count} processes"):
        _on(rows, GSPN2d(1, proxy_dim=1), torch.zeros(1, 1, 8, 6))
    mixer, image = GSPNMixer(4), torch.randn(1, 4, 8, 6)
    told = "rank 0 has 1 of 4 channels in float32; rank 1 has 2 of 4 channels in float64"
    with pytest.raises(ValueError, match=rf"^rank {rank} of 2: the processes have other images: {told}\."):
        _on(rows, mixer, torch.zeros(rank + 1, 4, 8, 6, dtype=(torch.float32, torch.float64)[rank]))
    expected = mixer(image)
    with rows.applied(mixer):
        with pytest.raises(NotImplementedError, match=r"in_proj.*forward that replaces"), rows.applied(mixer):
            pass
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copy.deepcopy(mixer)
        torch.testing.assert_close(rows.gather(mixer(rows.take(image))), expected)
    assert torch.equal(copy.deepcopy(mixer)(image), expected)
    for module in (
        nn.MaxPool2d(2), nn.MultiheadAttention(4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.LayerNorm((4, 8, 6)),
        nn.Softmax(2), SelfAttention2d(4, head_dim=4),
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match=f"{type(module).__name__}, and it is not known to treat"):
            _on(rows, module, torch.zeros(1, 4, 8, 6))
    with pytest.raises(NotImplementedError, match="alignment='official'"):
        _on(rows, GSPN2d(4, alignment="official"), torch.zeros(1, 4, 8, 6))
    with pytest.raises(NotImplementedError, match="of some rows only the mean"):
        _on(rows, nn.AdaptiveAvgPool2d(2), torch.zeros(1, 4, 8, 6))
    with pytest.raises(NotImplementedError, match="only numbers of rows"):
        _on(rows, nn.Conv2d(4, 4, 3, padding="same"), torch.zeros(1, 4, 8, 6))


def _on(rows: ImageRows, module: nn.Module, image: Tensor) -> Tensor:
    with rows.applied(module):
        return module(rows.take(image))


def check_batch(group: Any) -> None:
    """Some images, each over a group of processes: the average over all processes is the batch's gradient."""
    images = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    mixer, rows = GSPNMixer(6).double(), ImageRows(9, 7, group=group)
    mixer(images).square().mean().backward()
    expected = [one.grad for one in mixer.parameters()]
    mixer.zero_grad()
    parallel = nn.parallel.DistributedDataParallel(mixer)
    mine = images[dist.get_rank() * 2 // dist.get_world_size()][None]
    with rows.applied(mixer):
        rows.mean(parallel(rows.take(mine)).square()).backward()
    for i, (one, other) in enumerate(zip(mixer.parameters(), expected, strict=True)):
        near(one.grad, other, f"gradient {i}")  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [2, 4])
def test_everything_is_as_on_one_process(count: int, tmp_path: Path) -> None:
    over(
        count, tmp_path, check_propagate, check_models, check_autocast, check_sent, check_order,
        *([check_refusals] if count == 2 else []),
    )  # fmt: skip


def test_images_of_a_batch_and_rows_of_an_image(tmp_path: Path) -> None:
    over(4, tmp_path, check_propagate, check_batch, groups=2)


def _dies(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    rows, mixer = ImageRows(9, 7), GSPNMixer(6)
    begin = time.monotonic()
    try:
        with rows.applied(mixer):
            for step in range(1000):
                if step == 3 and rows.rank == 1:
                    signal.raise_signal(signal.SIGKILL)
                mixer(rows.take(torch.randn(1, 6, 9, 7)))
    except RuntimeError as error:
        (folder / f"error-{rows.rank}").write_text(f"{time.monotonic() - begin:.0f} {error}")


def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        start_many(2, tmp_path / "printed.txt", _dies, tmp_path)
    seconds, _, message = (tmp_path / "error-0").read_text().partition(" ")
    assert float(seconds) < 30 and message

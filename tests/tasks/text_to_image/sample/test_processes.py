"""Several processes that draw: images over them, rows of an image over them, and one that is killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from rich.console import Console

from gspn._errors import UsageError
from gspn.cli import app
from gspn.tasks.core.devices import Processes
from gspn.tasks.diffusion import evaluation
from gspn.tasks.text_to_image import decoding
from gspn.tasks.text_to_image.decoding import shared_tiles, tiles, to_latents, to_pixels
from gspn.tasks.text_to_image.sample import UpscalingConfig, sample, unet_by_rows
from gspn.tasks.text_to_image.sample.progressive_upscaling import Stage
from tasks.processes import start_many
from tasks.text_to_image.t2i_support import make_adapter, make_sd, make_vae

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distributed")]

# Trained at 64 pixels: two stages, the second in tiles of 64 pixels.
SIZE: dict[str, Any] = {"height": 112, "width": 88, "steps": 3, "device": "cpu"}
UPSCALED: dict[str, Any] = {**SIZE, "upscale": True, "tiling": "on", "seed": 2}
DILATED: dict[str, Any] = {**UPSCALED, "upscale": UpscalingConfig(dilated=True, space="pixels")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    pipeline = make_sd(path)
    pipeline.save_pretrained(path / "pipeline")
    make_adapter(pipeline).save_pretrained(path / "adapter")
    return path


def _sample(saved: Path, output: Path, **options: Any) -> Any:
    decoding.MIN_TILE = 64
    return sample(
        str(saved / "pipeline"), ["a cat", "two dogs", "a sun"], output=output, adapter=str(saved / "adapter"),
        console=Console(quiet=True), **options,
    )  # fmt: skip


def _files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def _all_ways(saved: Path, folder: Path) -> None:
    dist.init_process_group("gloo")  # one for all calls
    images = _sample(saved, folder / "images", **UPSCALED)
    _sample(saved, folder / "rows", **UPSCALED, check=False, shard_image=True)
    again = _sample(saved, folder / "rows", **UPSCALED, check=False, shard_image=True)
    _sample(saved, folder / "dilated", **DILATED, check=False, shard_image=True, batch_size=2)
    if images.is_main:
        (folder / "counts").write_text(f"{images.drawn} {again.drawn}")


def _pixels(directory: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(directory.glob("0*.png"))]).astype(int)


def test_images_and_rows_over_processes(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MIN_TILE", 64)
    start_many(2, tmp_path / "printed.txt", _all_ways, saved, tmp_path / "two")
    _sample(saved, tmp_path / "one", **UPSCALED, check=False)
    assert _files(tmp_path / "two" / "images") == _files(tmp_path / "one")  # bit for bit, stages too
    assert (tmp_path / "two" / "counts").read_text() == "3 0"  # a second call finds all finished
    one = _pixels(tmp_path / "one")
    assert one.std() > 3 and np.abs(_pixels(tmp_path / "two" / "rows") - one).max() <= 1
    _sample(saved, tmp_path / "dilated", **DILATED, check=False, batch_size=2)
    dilated = _pixels(tmp_path / "dilated")
    assert (dilated != one).any() and np.abs(_pixels(tmp_path / "two" / "dilated") - dilated).max() <= 1


def _decode(folder: Path) -> None:
    processes = Processes.join("cpu")
    torch.manual_seed(4)
    vae = make_vae()
    from types import SimpleNamespace

    config = SimpleNamespace(addition_embed_type=None)
    pipeline = SimpleNamespace(vae=vae, unet=SimpleNamespace(config=config))
    latents = torch.randn(2, 4, 21, 18)
    with tiles(vae, True, side=64):
        expected = to_pixels(pipeline, latents)
        encoded = to_latents(pipeline, expected)
        calls: list[Any] = []
        handle = vae.decoder.register_forward_hook(lambda *_: calls.append(1))
        with shared_tiles(vae, processes):
            assert torch.equal(to_pixels(pipeline, latents), expected)
            assert torch.equal(to_latents(pipeline, expected), encoded)
        handle.remove()
    assert {"tiled_decode", "_tiled_encode"}.isdisjoint(vars(vae)) and "forward" not in vars(vae.decoder)
    # Twelve tiles, which are seen, computed by one, and blended.
    assert len(calls) == 24 + len(processes.share(range(12)))
    (folder / f"decoded-{processes.rank}").touch()


def test_tiles_over_processes_are_those_of_one(tmp_path: Path) -> None:
    start_many(2, tmp_path / "printed.txt", _decode, tmp_path)
    assert len(list(tmp_path.glob("decoded-*"))) == 2


def test_refusals(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="start them with torchrun --nproc-per-node N"):
        _sample(saved, tmp_path, **SIZE, shard_image=True)
    pipeline = make_sd(tmp_path)
    stage = Stage(64, 64, 1)
    with pytest.raises(UsageError, match=r"has its own self-attention, .* pass --adapter"):
        unet_by_rows.check_rows(pipeline.unet, [stage], 8, 2, dilated=False)
    with make_adapter(pipeline).mounted(pipeline.unet):
        unet_by_rows.check_rows(pipeline.unet, [stage], 8, 4, dilated=False)
        with pytest.raises(UsageError, match=r"has 4 rows for 5 .* at most 4 .* 5 x 16 = 80 pixels high"):
            unet_by_rows.check_rows(pipeline.unet, [stage], 8, 5, dilated=False)
        with pytest.raises(UsageError, match="has 2 rows for 3 "):
            unet_by_rows.check_rows(pipeline.unet, [Stage(64, 64, 1, dilation=2)], 8, 3, dilated=True)
        with pytest.raises(UsageError, match="a mixer has 16 channels for 17 processes"):
            unet_by_rows.check_rows(pipeline.unet, [stage], 8, 17, dilated=False)


def _dies(saved: Path, folder: Path, victim: int) -> None:
    rank = int(os.environ["RANK"])
    with (folder / f"printed-{rank}.txt").open("w") as file:
        os.dup2(file.fileno(), 2)
    plain_call, plain_save, calls = unet_by_rows.UNetByRows.__call__, Image.Image.save, []

    def call(self: Any, *args: Any, **options: Any) -> Any:
        calls.append("call")
        if calls.count("call") == 5 and rank == victim == 1:  # in the second image
            signal.raise_signal(signal.SIGKILL)
        return plain_call(self, *args, **options)

    def save(self: Any, path: Path, **options: Any) -> None:
        plain_save(self, path, **options)
        calls.append("save")
        if calls.count("save") == 2 and rank == victim == 0:  # half of the second image is written
            os.truncate(path, 100)
            signal.raise_signal(signal.SIGKILL)

    unet_by_rows.UNetByRows.__call__, Image.Image.save = call, save
    begin, code = time.monotonic(), None
    try:
        app(
            ["t2i", "sample", "a cat", "--model", str(saved / "pipeline"), "--adapter", str(saved / "adapter"),
             "-n", "3", "--output", str(folder / "drawn"), "--steps", "3", "--size", "64x64", "--device", "cpu",
             "--shard-image"]
        )  # fmt: skip
    except SystemExit as error:
        code = error.code
    (folder / f"ended-{rank}").write_text(f"{code} {time.monotonic() - begin:.0f}")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_others(saved: Path, tmp_path: Path, victim: int) -> None:
    with pytest.raises(AssertionError):
        start_many(2, tmp_path / "printed.txt", _dies, saved, tmp_path, victim)
    other = 1 - victim
    code, seconds = (tmp_path / f"ended-{other}").read_text().split()
    assert code == "1" and float(seconds) < 60
    assert not (tmp_path / f"ended-{victim}").exists()
    (line,) = (one for one in (tmp_path / f"printed-{other}.txt").read_text().splitlines() if one.startswith("error:"))
    assert line.startswith(f"error: process {other} stops: another of the 2 that share the work has ended")
    images = [one.name for one in (tmp_path / "drawn").iterdir() if not one.name.startswith(".")]
    assert images == ["00000.png"] and _pixels(tmp_path / "drawn").shape == (1, 64, 64, 3)
    assert len(list((tmp_path / "drawn").glob(".part-*"))) == 1 - victim
    _sample(saved, tmp_path / "drawn", steps=1, device="cpu")
    assert sorted(one.name for one in (tmp_path / "drawn").iterdir()) == [f"{i:05d}.png" for i in range(3)]  # no part


def _evaluates(saved: Path, folder: Path) -> None:
    class Model(torch.nn.Module):
        label = "means"

        def forward(self, x: torch.Tensor) -> Any:
            self.seen = getattr(self, "seen", 0) + len(x)
            pooled = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
            return evaluation.Features(pooled, pooled[:, :5], pooled[:, :3])

    model = Model()
    evaluation.feature_model = lambda _name: model
    if "RANK" in os.environ:
        dist.init_process_group("gloo")  # one for both calls
    images = [evaluation.ImageSet(name, pixels, [-1] * len(pixels), []) for name, pixels in _sets()]
    for cache in (folder / "cache", folder / "cache"):  # the second with the reference's features of the first
        metrics, fake, _ = evaluation.compare_images(
            *images, batch_size=4, device="cpu", cache=cache, console=Console(quiet=True)
        )
    count = int(os.environ.get("WORLD_SIZE", "1"))
    # Both sets once, and the samples again: batches of 4 of 22 and 27 images.
    assert model.seen == 71 if count == 1 else model.seen < 45
    torch.save((metrics, fake), folder / f"metrics-{os.environ.get('RANK', 'alone')}.pt")


def _sets() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = (("samples", 22), ("reference", 27))
    return [(name, torch.randint(0, 256, (n, 3, 16, 16), generator=generator).byte()) for name, n in shapes]


def test_features_over_processes(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "feature_model", None)
    (tmp_path / "alone").mkdir()
    (tmp_path / "two").mkdir()
    _evaluates(saved, tmp_path / "alone")
    start_many(2, tmp_path / "printed.txt", _evaluates, saved, tmp_path / "two")
    alone, features = torch.load(tmp_path / "alone" / "metrics-alone.pt", weights_only=False)
    for rank in range(2):
        metrics, same = torch.load(tmp_path / "two" / f"metrics-{rank}.pt", weights_only=False)
        assert metrics == alone and all(torch.equal(*pair) for pair in zip(same, features, strict=True))

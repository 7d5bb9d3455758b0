"""Sampling: what depends on the seed alone, what is written, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from gspn._errors import UsageError
from gspn.cli import app
from gspn.diffusers import ClassConditionalPipeline, GSPNDenoiser2DModel
from gspn.tasks.class_conditional import DiffusionConfig, sample
from gspn.tasks.class_conditional.sampling import _number_or_name
from gspn.tasks.diffusion.schedulers import training_scheduler


def pipeline(objective="epsilon", vae=None, **options):
    torch.manual_seed(0)
    config = DiffusionConfig(objective=objective, learned_sigma=objective == "epsilon", timesteps=100)
    channels = 4 if vae else 3
    defaults = {"dim": 16, "num_layers": 2, "num_class_embeds": 3, "sample_size": 8, "in_channels": channels}
    model = GSPNDenoiser2DModel(
        **{**defaults, "out_channels": channels * (2 if config.learned_sigma else 1), **options}
    )
    torch.nn.init.normal_(model.out_proj.weight, std=0.05)
    names = {0: "cat", 1: "dog", 2: "newt"}
    return ClassConditionalPipeline(model.eval(), training_scheduler(config, pixels=vae is None), vae, names)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    pipeline().save_pretrained(path)
    return path


def pixels(directory):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(directory.glob("0*.png"))]).astype(int)


def test_images_do_not_depend_on_the_batch(saved, tmp_path):
    options = {"number": 7, "steps": 4, "scheduler": "ddpm", "seed": 5}
    whole = sample(saved, output=tmp_path / "a", batch_size=7, **options)
    sample(saved, output=tmp_path / "b", batch_size=2, **options)
    sample(saved, output=tmp_path / "c", batch_size=7, **{**options, "seed": 6})
    a, b, c = (pixels(tmp_path / name) for name in "abc")
    assert a.shape == (7, 8, 8, 3)
    assert abs(a - b).max() <= 1  # of 256 levels: sums of another batch may round otherwise
    assert abs(a - c).max() > 10
    assert [record.label for record in whole.records] == [0, 1, 2, 0, 1, 2, 0]
    assert whole.grid.is_file()


def test_origins_are_in_the_files(saved, tmp_path):
    sample(saved, output=tmp_path, classes=["newt"], number=2, steps=2, guidance=1.5, height=6, width=10)
    with Image.open(tmp_path / "00001.png") as image:
        assert image.size == (10, 6)
        origin = json.loads(image.text["gspn"])
    assert origin["class_name"] == "newt" and origin["label"] == 2 and origin["index"] == 1
    assert (origin["guidance"], origin["steps"], origin["scheduler"]) == (1.5, 2, "DDIMScheduler")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["cow"]}, "cow"),
        ({"classes": [3]}, "out of range"),
        ({"classes": []}, "no classes"),
        ({"height": 7}, "multiple of 2"),
        ({"scheduler": "flow"}, "does not fit"),
        ({"number": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_met(saved, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        sample(saved, output=tmp_path, steps=2, **options)


def test_what_is_no_pipeline(tmp_path):
    with pytest.raises(UsageError, match="model_index"):
        sample(tmp_path, output=tmp_path / "out")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be loaded"):
        sample(tmp_path, output=tmp_path / "out")


def test_guidance_is_what_it_says():
    found = pipeline(class_dropout_prob=0.1)
    found.scheduler.set_timesteps(10)
    x, labels, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 2]), torch.tensor(50)
    conditional, free = found._predict(x, t, labels, 1.0), found._predict(x, t, labels, 0.0)
    guided = found._predict(x, t, labels, 3.0)
    torch.testing.assert_close(guided[:, :3], free[:, :3] + 3 * (conditional[:, :3] - free[:, :3]))
    torch.testing.assert_close(guided[:, 3:], conditional[:, 3:])
    model = found.transformer
    torch.testing.assert_close(free, model(x, t, torch.tensor([3, 3])).sample)


@pytest.mark.parametrize("objective", ["epsilon", "flow"])
def test_latents_are_decoded(objective, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4)  # fmt: skip
    found = pipeline(objective, vae.eval())
    found.set_progress_bar_config(disable=True)
    assert found.default_size == 16
    noise = torch.randn(1, 4, 8, 12)
    options = {"num_inference_steps": 3, "guidance_scale": 1.0, "height": 16, "width": 24, "latents": noise}
    latent = found(["dog"], output_type="latent", **{**options, "generator": torch.manual_seed(0)}).images
    images = found(["dog"], output_type="pt", **{**options, "generator": torch.manual_seed(0)}).images
    expected = vae.decode(latent / vae.config.scaling_factor).sample
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1))
    found.save_pretrained(tmp_path)
    again = ClassConditionalPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    same = again(["dog"], output_type="pt", **{**options, "generator": torch.manual_seed(0)}).images
    assert torch.equal(same, images)
    with pytest.raises(ValueError, match="multiple of 4"):
        found(["dog"], height=18)
    with pytest.raises(ValueError, match=r"latents\.shape"):
        found(["dog"], latents=noise)


def test_the_command(saved, tmp_path):
    run = CliRunner().invoke
    arguments = ["class-conditional", "sample", str(saved), "--steps", "2", "--device", "cpu", "-o", str(tmp_path)]
    result = run(app, [*arguments, "--class", "cat", "--class", "2", "-n", "4", "--size", "8x6"])
    assert result.exit_code == 0, result.output
    assert "4 images" in result.output and (tmp_path / "grid.png").is_file()
    assert Image.open(tmp_path / "00003.png").size == (8, 6)
    for size in ("big", "6x", "x6"):
        result = run(app, [*arguments, "--size", size])
        assert result.exit_code == 2 and "--size" in result.output
    result = run(app, [*arguments, "--class", "cow"])
    assert result.exit_code == 2 and "cow" in result.output


def test_training_from_the_command(tmp_path):
    run = CliRunner().invoke
    result = run(app, ["class-conditional", "train", "--config", "mnist5k", "--lr", "0.5", "--dry-run"])
    assert result.exit_code == 0 and "lr: 0.5" in result.output
    options = [
        "--data",
        "digits",
        "--epochs",
        "1",
        "--batch-size",
        "256",
        "--workers",
        "0",
        "-o",
        str(tmp_path / "run"),
    ]
    settings = ["data.size=8", "data.channels=1", "model.options={dim: 8, num_layers: 2}", "samples.every=0",
                "run.trackers=[]", "run.device=cpu"]  # fmt: skip
    result = run(app, ["class-conditional", "train", *options, *(f"--set={one}" for one in settings)])
    assert result.exit_code == 0, result.output
    assert "epoch 1/1" in result.output and (tmp_path / "run" / "last" / "model_index.json").is_file()
    result = run(app, ["class-conditional", "train", "--set", "model.name=unet"])
    assert result.exit_code == 2 and "unet" in result.output
    result = run(app, ["class-conditional", "presets"])
    assert result.exit_code == 0 and "mnist5k" in result.output
    assert run(app, ["class-conditional", "preset", "mnist5k"]).output.startswith("#")


def test_the_grid_has_the_first_images_and_opens_one_file_at_a_time(saved, tmp_path, monkeypatch):
    import resource

    from gspn.tasks.class_conditional import sampling

    monkeypatch.setattr(sampling, "_GRID_IMAGES", 50)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, limit[1]))
    said = io.StringIO()
    try:
        result = sample(saved, output=tmp_path, number=60, steps=1, batch_size=60, console=Console(file=said))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert "grid.png shows the first 48 of 60 images" in said.getvalue()  # 16 columns for each of 3 classes
    with Image.open(result.grid) as grid:
        assert grid.width > 16 * 48


def test_numbers_that_cannot_be_are_refused(saved, tmp_path):
    for options in ({"guidance": float("nan")}, {"guidance": -1.0}, {"number": 0}, {"steps": 0}, {"batch_size": 0}):
        with pytest.raises(UsageError):
            sample(saved, output=tmp_path, **options)


def test_a_name_that_is_a_number_is_a_name():
    names = {"1": 0, "2": 1, "10": 2}
    assert [_number_or_name(one, names) for one in ("1", "10", "0", 1, "cat", "²")] == ["1", "10", 0, 1, "cat", "²"]

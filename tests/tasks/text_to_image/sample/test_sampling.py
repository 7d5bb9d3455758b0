"""Drawing from text: what diffusers draws, what depends on the seed alone, what is written, and what is refused."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PNDMScheduler
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from gspn._errors import UsageError
from gspn.cli import app
from gspn.tasks.diffusion.schedulers import named_scheduler
from gspn.tasks.text_to_image.conditioning import encode_nothing, encode_prompts
from gspn.tasks.text_to_image.decoding import to_images, to_latents, to_pixels
from gspn.tasks.text_to_image.sample import stage_runner
from gspn.tasks.text_to_image.sample.denoising import GuidanceInputs, denoise, draw_noise, first_step, image_generators
from gspn.tasks.text_to_image.sample.sampling import sample
from tasks.text_to_image.t2i_support import make_adapter, make_sd, make_sdxl

FAST = {"steps": 4, "console": Console(quiet=True), "check": False}


def pixels(directory):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(directory.glob("0*.png"))]).astype(int)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    pipeline = make_sd(path)
    pipeline.save_pretrained(path / "pipeline")
    make_adapter(pipeline).save_pretrained(path / "adapter")
    return path


@pytest.mark.parametrize(("kind", "split"), [("sd", False), ("sdxl", True)])
@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "euler_a", "unipc"])
def test_draws_what_diffusers_draws(request, monkeypatch, kind, name, split):
    pipeline = request.getfixturevalue(kind)
    monkeypatch.setattr(pipeline, "scheduler", named_scheduler(name, pipeline.scheduler))
    prompts, height, width = ["a cat", "two dogs"], 8 * pipeline.vae_scale_factor, 12 * pipeline.vae_scale_factor
    noise = draw_noise(image_generators(0, [0, 1]), (4, 8, 12), torch.device("cpu"))
    again = [torch.Generator().manual_seed(i) for i in range(2)]
    expected = pipeline(
        prompts, negative_prompt=["bad"] * 2, height=height, width=width, num_inference_steps=5, guidance_scale=4.0,
        latents=noise, generator=again, output_type="latent",
    ).images  # fmt: skip

    scheduler = named_scheduler("auto", pipeline.scheduler)
    assert type(scheduler) is type(pipeline.scheduler)
    scheduler.set_timesteps(5)
    negative = encode_prompts(pipeline, ["bad"])[[0, 0]]
    inputs = GuidanceInputs(encode_prompts(pipeline, prompts), negative, 4.0, split)
    again = [torch.Generator().manual_seed(i) for i in range(2)]
    latents = denoise(
        pipeline.unet,
        scheduler,
        noise * scheduler.init_noise_sigma,
        inputs,
        height=height,
        width=width,
        generators=again,
    )
    assert latents.std() > 0.1
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_whole_image_is_diffusers(request, monkeypatch, kind, prediction, tmp_path):
    """With the adapter, without a negative prompt, to the pixels."""
    pipeline = request.getfixturevalue(kind)
    monkeypatch.setattr(pipeline, "scheduler", type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, prediction_type=prediction
    ))  # fmt: skip
    adapter = make_adapter(pipeline)
    height, width = 8 * pipeline.vae_scale_factor, 12 * pipeline.vae_scale_factor
    sample(pipeline, "a cat", adapter=adapter, output=tmp_path, height=height, width=width, seed=3, **FAST)
    noise = draw_noise(image_generators(3, [0]), (4, 8, 12), torch.device("cpu"))
    with adapter.mounted(pipeline.unet):
        expected = pipeline(
            "a cat", height=height, width=width, num_inference_steps=4, guidance_scale=5.0, latents=noise
        ).images[0]
    found = pixels(tmp_path)[0]
    assert found.std() > 3
    assert np.abs(found - np.asarray(expected).astype(int)).max() <= 1


def test_decoding_is_diffusers(tmp_path):
    """A VAE with means of its own, which the XL pipeline minds; and back again."""
    sdxl = make_sdxl(tmp_path)
    sdxl.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    caught = {}

    def keep(_pipeline, _step, _t, given):
        caught["latents"] = given["latents"]
        return given

    expected = sdxl(
        "cat", height=32, width=32, num_inference_steps=2, latents=noise, output_type="pt", callback_on_step_end=keep
    ).images
    torch.testing.assert_close((to_pixels(sdxl, caught["latents"]) / 2 + 0.5).clamp(0, 1), expected)
    assert to_images(sdxl, to_pixels(sdxl, caught["latents"]))[0].size == (32, 32)
    given = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mode, config = sdxl.vae.encode(given).latent_dist.mode().detach(), sdxl.vae.config
    mean, deviation = (torch.tensor(one).view(1, 4, 1, 1) for one in (config.latents_mean, config.latents_std))
    torch.testing.assert_close(to_latents(sdxl, given), (mode - mean) / deviation * config.scaling_factor)


@pytest.mark.parametrize("upscale", [False, True])
def test_images_do_not_depend_on_the_batch(sd, tmp_path, upscale):
    options = {**FAST, "number": 3, "seed": 5, "scheduler": "euler_a", "width": 128, "height": 64, "upscale": upscale}
    whole = sample(sd, ["cat", "dog"], output=tmp_path / "a", batch_size=6, **options)
    sample(sd, ["cat", "dog"], output=tmp_path / "b", batch_size=4, **options)
    sample(sd, ["cat", "dog"], output=tmp_path / "c", batch_size=1, **options)
    sample(sd, ["cat", "dog"], output=tmp_path / "d", batch_size=6, **{**options, "seed": 6})
    sample(sd, ["cat", "dog"], output=tmp_path / "e", batch_size=6, **{**options, "number": 1})
    a, b, c, d, e = (pixels(tmp_path / name) for name in "abcde")
    assert a.shape == (6, 64, 128, 3)
    assert np.abs(a - b).max() <= 1 and np.abs(a - c).max() <= 1  # of 256 levels: sums of another batch round otherwise
    assert np.abs(a - d).max() > 10 and np.abs(a[0] - a[2]).max() > 10
    assert np.abs(a[:2] - e).max() <= 1
    assert [record.prompt for record in whole.records] == ["cat", "dog"] * 3


def test_stages_draw_noise_of_their_own():
    first, second, other, seeded = (
        draw_noise(image_generators(*given), (4, 8, 8), torch.device("cpu"))
        for given in [(0, [0, 1]), (0, [1], 0), (0, [1], 1), (1, [1])]
    )
    assert torch.equal(first[1:], second)
    assert not torch.equal(second, other) and not torch.equal(second, seeded)


def test_origins_are_in_the_files(saved, tmp_path):
    found = sample(
        saved / "pipeline", "a cat", adapter=saved / "adapter", output=tmp_path, number=2, guidance=1.0, seed=7,
        scheduler="dpm++", width=72, height=40, **FAST,
    )  # fmt: skip
    with Image.open(tmp_path / "00001.png") as image:
        assert image.size == (72, 40)
        origin = json.loads(image.text["gspn"])
    assert (origin["index"], origin["prompt"], origin["seed"], origin["steps"]) == (1, "a cat", 7, 4)
    assert (origin["width"], origin["height"], origin["guidance"]) == (72, 40, 1.0)
    assert origin["scheduler"] == "DPMSolverMultistepScheduler" and origin["negative"] is None
    assert origin["pipeline"] == str(saved / "pipeline") and origin["adapter"] == str(saved / "adapter")
    assert origin["stages"] == [{"height": 40, "width": 72, "steps": 4, "strength": None, "dilation": 1}]
    assert origin["upscaling"] is None and origin["precision"] == "fp32" and origin["tiled"] is False
    assert found.drawn == 2 and found.estimate is None and len(found.records) == 2
    # Without upscaling nothing is kept, and a second call draws again.
    assert not (tmp_path / "stages").exists()
    assert not list(tmp_path.glob(".part*"))


def test_the_adapter_and_the_guidance_count(sd, tmp_path):
    adapter = make_adapter(sd)
    before = {name: value.clone() for name, value in sd.unet.state_dict().items()}
    changes = [{}, {"adapter": adapter}, {"guidance": 1.0}, {"guidance": 0.0}, {"negative": "dog"}]
    for number, options in enumerate(changes):
        sample(sd, "cat", output=tmp_path / str(number), **FAST, **options)
    found = [pixels(tmp_path / str(number))[0] for number in range(len(changes))]
    for i, one in enumerate(found):
        assert one.shape == (64, 64, 3)  # of the training
        assert all(np.abs(one - other).max() > 1 for other in found[:i])
    assert adapter.mounted_on is None
    assert all(torch.equal(value, before[name]) for name, value in sd.unet.state_dict().items())
    with adapter.mounted(sd.unet):  # mounted by the caller: it stays
        sample(sd, "cat", output=tmp_path / "mounted", adapter=adapter, **FAST)
        assert adapter.mounted_on is sd.unet
    assert np.abs(pixels(tmp_path / "mounted")[0] - found[1]).max() <= 1


def test_modes_are_given_back(sd, tmp_path):
    sd.unet.train()
    try:
        sample(sd, "cat", output=tmp_path, adapter=make_adapter(sd), **FAST)
        assert sd.unet.training and all(module.training for module in sd.unet.modules())
        assert not sd.vae.training
    finally:
        sd.unet.eval()


def test_unmounts_after_an_error(sd, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("in the middle")

    adapter = make_adapter(sd)
    monkeypatch.setattr(stage_runner, "denoise", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        sample(sd, "cat", output=tmp_path, adapter=adapter, tiling="on", **FAST)
    assert adapter.mounted_on is None and not sd.vae.use_tiling


def test_lower_precision(saved, tmp_path):
    options = {**FAST, "adapter": saved / "adapter", "width": 96, "height": 64}
    for precision in ("fp32", "bf16"):
        sample(saved / "pipeline", "cat", output=tmp_path / precision, precision=precision, **options)
    full, half = (pixels(tmp_path / name)[0] for name in ("fp32", "bf16"))
    assert 0 < np.abs(full - half).mean() < 8 < full.std()


def test_what_is_seen_off_a_terminal(sd, tmp_path):
    text = io.StringIO()
    options = {**FAST, "console": Console(file=text, width=100)}
    sample(sd, "cat", output=tmp_path, number=2, batch_size=2, upscale=True, width=128, height=128, **options)
    lines = text.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("images 0 to 1, stage 1 of 2: 64x64, 4 steps in ")
    assert lines[1].startswith("images 0 to 1, stage 2 of 2: 128x128, 1 step in ")


def test_what_is_seen_on_a_terminal(sd, tmp_path):
    text = io.StringIO()
    console = Console(file=text, width=100, force_terminal=True, legacy_windows=False)
    sample(
        sd, "cat", output=tmp_path, upscale=True, width=128, height=128, **{**FAST, "console": console, "check": True}
    )
    assert "Estimate" in text.getvalue() and "stage 2 of 2" in text.getvalue() and "decoding" in text.getvalue()
    assert "5/5" in text.getvalue()


def test_schedulers_by_name(sd, monkeypatch, tmp_path):
    assert first_step(50, 0.42) == 29 and first_step(4, 2.0) == 0 and first_step(4, 0.2) == 4
    # PNDM cannot start in the middle.
    pndm = PNDMScheduler(skip_prk_steps=True, prediction_type="v_prediction", beta_schedule="scaled_linear")
    found = named_scheduler("auto", pndm, auto="dpm++")
    assert type(found).__name__ == "DPMSolverMultistepScheduler"
    assert found.config.prediction_type == "v_prediction" and found.config.beta_schedule == "scaled_linear"
    assert named_scheduler("dpm++_sde", pndm).config.algorithm_type == "sde-dpmsolver++"
    own = named_scheduler("dpm++_sde", sd.scheduler)
    assert named_scheduler("auto", own).config.algorithm_type == "sde-dpmsolver++"
    assert type(named_scheduler("auto", sd.scheduler)) is type(sd.scheduler)
    monkeypatch.setattr(sd, "scheduler", pndm)
    assert sample(sd, "cat", output=tmp_path, **FAST).records[0].scheduler == "DPMSolverMultistepScheduler"
    monkeypatch.setattr(sd, "scheduler", FlowMatchEulerDiscreteScheduler())
    with pytest.raises(UsageError, match="FlowMatchEulerDiscreteScheduler"):
        sample(sd, "cat", output=tmp_path, **FAST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 100}, "width 100 is not a multiple of 8, the VAE's factor; take 96"),
        ({"height": 3}, "height 3 is not a multiple of 8, the VAE's factor; take 8"),
        ({"scheduler": "dpmpp"}, "scheduler 'dpmpp' is unknown; use one of auto, dd"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 1001}, "1001 steps: this DDIMScheduler takes 999 or fewer"),
        ({"number": 0}, "at least 1"),
        ({"guidance": -1.0}, "guidance -1.0"),
        ({"prompts": []}, "no prompt"),
        ({"tiling": "yes"}, "'yes' is unknown; use one of auto, on, off"),
        ({"offload": "activations"}, "nothing to offload to"),
        ({"precision": "bf16"}, "the pipeline's is torch.float32"),
        ({"precision": "int8"}, "'int8' is unknown"),
        ({"device": "tpu"}, "'tpu' is unknown"),
        ({"adapter": "no-such"}, "no-such"),
        ({"pipeline": object()}, "a object is not a supported"),
    ],
)
def test_what_cannot_be_met(sd, tmp_path, options, message):
    options = {**FAST, **options}
    pipeline, prompts = options.pop("pipeline", sd), options.pop("prompts", ["cat"])
    with pytest.raises(UsageError, match=message):
        sample(pipeline, prompts, output=tmp_path, **options)
    assert not list(tmp_path.glob("*.png"))


def test_an_adapter_of_another_model(sd, sdxl, tmp_path):
    with pytest.raises(UsageError, match=r"cannot be mounted: .*made for another model"):
        sample(sd, "cat", output=tmp_path, adapter=make_adapter(sdxl), **FAST)


def test_the_command(saved, tmp_path):
    given = [
        "t2i", "sample", "a cat", "--model", str(saved / "pipeline"), "--adapter", str(saved / "adapter"), "--size",
        "128x96", "--upscale", "--steps", "4", "--strength", "0.6", "--dilated", "--no-skip-residual", "--output",
        str(tmp_path), "--device", "cpu", "--seed", "2",
    ]  # fmt: skip
    found = CliRunner().invoke(app, [*given, "--estimate-only"])
    assert found.exit_code == 0, found.output
    assert "stage 2 of 2" in found.output and "128x96" in found.output and not list(tmp_path.iterdir())
    found = CliRunner().invoke(app, given)
    assert found.exit_code == 0, found.output
    assert "wrote 1 images" in found.output
    with Image.open(tmp_path / "00000.png") as image:
        assert image.size == (128, 96)
        origin = json.loads(image.text["gspn"])
    assert origin["upscaling"]["strengths"] == [0.6] and origin["upscaling"]["skip_residual"] is False
    given.append("--no-check")
    assert "wrote 0 images" in CliRunner().invoke(app, given).output
    for change, message in [
        (["--size", "12x"], "12x"),
        (["--size", "101x96"], "not a multiple of 8"),
        (["--steps", "5"], "steps=4, and this run has 5"),
        (["--model", "no-such"], "no-such"),
    ]:
        failed = CliRunner().invoke(app, [*given, *change])
        assert failed.exit_code == 2 and message in failed.output, failed.output
        assert failed.output.splitlines()[-1].startswith("error: ") and "Traceback" not in failed.output
    failed = CliRunner().invoke(app, ["t2i", "sample", "cat", "--model", str(saved / "pipeline"), "--dilated"])
    assert failed.exit_code == 2 and "--dilated needs --upscale" in failed.output


def test_no_text_is_what_the_pipeline_says(sdxl):
    assert encode_nothing(sdxl).states.abs().max() == 0  # force_zeros_for_empty_prompt

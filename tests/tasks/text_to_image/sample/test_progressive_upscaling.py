"""Progressive upscaling: its stages, the formulas of its options against plain ones, segments, and resuming."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from gspn._errors import UsageError
from gspn.diffusers import GSPNTokenMixer
from gspn.tasks.diffusion.schedulers import named_scheduler
from gspn.tasks.text_to_image.conditioning import encode_nothing, encode_prompts
from gspn.tasks.text_to_image.sample import stage_runner
from gspn.tasks.text_to_image.sample.denoising import GuidanceInputs, first_step, noise_level, predict
from gspn.tasks.text_to_image.sample.progressive_upscaling import (
    DilatedSampling,
    UpscalingConfig,
    gaussian_blur,
    plan_stages,
    segmented_scans,
    segments_beyond,
    skip_residual,
    sub_map_groups,
)
from gspn.tasks.text_to_image.sample.sampling import sample
from tasks.text_to_image.t2i_support import make_adapter, make_sd

QUIET = Console(quiet=True)
UPSCALE = {"upscale": True, "steps": 6, "console": QUIET, "check": False}


@pytest.fixture(scope="module")
def upscaled(sd, tmp_path_factory):
    """The directory of an upscaled image."""
    path = tmp_path_factory.mktemp("upscaled") / "images"
    sample(sd, "cat", output=path, width=128, height=64, **UPSCALE)
    return path


def sizes(stages):
    return [(stage.width, stage.height) for stage in stages]


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("multiple", [4, 8])
@pytest.mark.parametrize("area", [64 * 64, 512 * 512, 1024 * 1024])
@pytest.mark.parametrize("sides", [(8192, 4096), (8192, 8192), (1032, 520), (3000, 1000), (1080, 1920), (5000, 4992)])
def test_stages(sides, area, multiple):
    width, height = sides
    if width % multiple or height % multiple:
        with pytest.raises(UsageError, match="not a multiple of"):
            plan_stages(height, width, area=area, multiple=multiple, steps=30, upscaling=UpscalingConfig())
        return
    stages = plan_stages(height, width, area=area, multiple=multiple, steps=30, upscaling=UpscalingConfig())
    assert sizes(stages)[-1] == sides
    assert stages[0].height * stages[0].width < 1.3 * area
    assert len(stages) == 1 or stages[0].height * stages[0].width > 0.75 * area
    assert stages[0].strength is None and stages[0].steps == 30
    for before, after in itertools.pairwise(stages):
        assert before.height < after.height <= 2 * before.height
        assert before.width < after.width <= 2 * before.width
    for stage in stages:
        assert stage.height % multiple == stage.width % multiple == 0
        assert abs(stage.width / stage.height / (width / height) - 1) < 2.1 * multiple / min(stage.width, stage.height)
    assert [stage.strength for stage in stages[1:]] == [0.42, 0.32, 0.32, 0.28, 0.28, 0.28, 0.28][: len(stages) - 1]


def test_stages_of_the_paper():
    stages = plan_stages(8192, 8192, area=512 * 512, multiple=8, steps=50, upscaling=UpscalingConfig())
    assert sizes(stages) == [(side, side) for side in (512, 1024, 2048, 4096, 8192)]
    assert [stage.steps for stage in stages] == [50, 21, 16, 16, 14]
    assert [stage.dilation for stage in stages] == [1, 2, 4, 8, 16]


def test_no_stage_below_the_size_of_the_training():
    stages = plan_stages(256, 512, area=512 * 512, multiple=8, steps=30, upscaling=UpscalingConfig())
    assert sizes(stages) == [(512, 256)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": ()}, "at least one"),
        ({"strengths": (0.4, 1.5)}, "up to 1"),
        ({"skip_power": 0.0}, "skip_power=0.0"),
        ({"space": "bilinear"}, "'bilinear'.*latents, pixels"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        UpscalingConfig(**options)


def test_a_strength_without_a_step():
    with pytest.raises(UsageError, match=r"strength 0.1 of 6 steps leaves stage 2"):
        plan_stages(64, 64, area=32 * 32, multiple=8, steps=6, upscaling=UpscalingConfig(strengths=(0.1,)))


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "euler_a", "unipc", "ddpm"])
def test_skip_residual_is_its_formula(sd, name):
    scheduler = named_scheduler(name, sd.scheduler)
    scheduler.set_timesteps(10)
    begin = first_step(10, 0.5)
    scheduler.set_begin_index(begin) if hasattr(scheduler, "set_begin_index") else None
    generator = torch.Generator().manual_seed(0)
    clean, noise, latents = (torch.randn(2, 4, 6, 10, generator=generator) for _ in range(3))
    blend = skip_residual(scheduler, clean, noise, begin, 3.0)
    assert torch.equal(blend(latents, begin), latents)
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    for step in range(begin, 10):
        if step > begin:
            c = ((1 + math.cos(math.pi * (step - begin) / 5)) / 2) ** 3
            ratio = torch.sqrt(1 / kept[int(scheduler.timesteps[step].round())] - 1).float()
            scale = 1.0 if name.startswith("euler") else 1 / torch.sqrt(1 + ratio**2)
            expected = c * scale * (clean + ratio * noise) + (1 - c) * latents
            torch.testing.assert_close(blend(latents, step), expected, rtol=2e-3, atol=2e-3)
        scheduler.step(torch.zeros_like(latents), scheduler.timesteps[step], latents)


@pytest.mark.parametrize("size", [(12, 20), (13, 19), (3, 5), (1, 7)])
@pytest.mark.parametrize("stride", [2, 3, 4])
def test_sub_maps_are_each_place_once(size, stride):
    seen = torch.zeros(size)
    for group in sub_map_groups(*size, stride):
        shapes = set()
        for i, j in group:
            seen[i::stride, j::stride] += 1
            shapes.add(tuple(seen[i::stride, j::stride].shape))
        assert len(shapes) == 1
    assert torch.equal(seen, torch.ones(size))


def test_blur_keeps_mean_and_deviation_and_ends_as_identity():
    x = torch.randn(2, 4, 13, 19, generator=torch.Generator().manual_seed(0)) + 1
    y = gaussian_blur(x, 1.0, 5)
    torch.testing.assert_close(y.mean((-2, -1)), x.mean((-2, -1)))
    torch.testing.assert_close(y.std((-2, -1)), x.std((-2, -1)))
    assert (y.diff(dim=-1).abs().mean() / x.diff(dim=-1).abs().mean()) < 0.8
    torch.testing.assert_close(gaussian_blur(x, 0.01, 13), x)
    # Against a plain sum over the window, up to the restored mean and deviation.
    row = torch.arange(-2, 3).float()
    kernel = torch.exp(-(row[:, None] ** 2 + row**2) / 2)
    inner = (x[0, 0, 4:9, 4:9] * kernel).sum() / kernel.sum()
    plain = torch.nn.functional.conv2d(
        torch.nn.functional.pad(x[:1, :1], (2,) * 4, mode="replicate"), kernel[None, None] / kernel.sum()
    )
    torch.testing.assert_close(plain[0, 0, 6, 6], inner)
    whitened = (plain - plain.mean()) / plain.std(correction=0) * x[0, 0].std(correction=0) + x[0, 0].mean()
    torch.testing.assert_close(y[:1, :1], whitened)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_dilated_is_its_formula(tmp_path, prediction, name):
    """Sub-map by sub-map, one image at a time, and mixed as estimates of the clean map."""
    pipeline = make_sd(tmp_path, prediction=prediction)
    scheduler = named_scheduler(name, pipeline.scheduler)
    scheduler.set_timesteps(10)
    begin, stride, step = 4, 3, 6
    text = encode_prompts(pipeline, ["cat", "dog"])
    inputs = GuidanceInputs(text, encode_nothing(pipeline)[torch.zeros(2, dtype=torch.long)], 3.0)
    x = torch.randn(2, 4, 13, 20, generator=torch.Generator().manual_seed(0))
    t = scheduler.timesteps[step]
    config = UpscalingConfig(dilated=True, dilated_power=2.0, blur=1.5, blur_power=0.5)
    with torch.no_grad():
        plain = predict(pipeline.unet, x, t, inputs, height=104, width=160)
        dilated = DilatedSampling(pipeline.unet, scheduler, inputs, stride, 8, begin, config)
        got = dilated(x, plain, step)
        cosine = (1 + math.cos(math.pi * (step - begin) / (10 - begin))) / 2
        blurred = gaussian_blur(x, 0.01 + 1.49 * cosine**0.5, 4 * stride - 3)
        found = torch.zeros_like(x)
        for row in range(2):
            own = GuidanceInputs(inputs.text[[row]], inputs.negative[[row]], 3.0)
            for i in range(stride):
                for j in range(stride):
                    part = blurred[row : row + 1, :, i::stride, j::stride]
                    size = {"height": part.shape[2] * 8, "width": part.shape[3] * 8}
                    found[row : row + 1, :, i::stride, j::stride] = predict(pipeline.unet, part, t, own, **size)
    alpha, sigma = noise_level(scheduler, step)
    assert alpha**2 + sigma**2 == pytest.approx(1)

    def clean(map_, predicted):
        return {
            "epsilon": lambda: (map_ - sigma * predicted) / alpha,
            "v_prediction": lambda: alpha * map_ - sigma * predicted,
            "sample": lambda: predicted,
        }[prediction]()

    c = cosine**2
    expected = c * clean(blurred, found) + (1 - c) * clean(x, plain)
    torch.testing.assert_close(clean(x, got), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-2)


@pytest.mark.parametrize(("kind", "dilated"), [("sd", True), ("sdxl", False)])
def test_four_times_the_size(request, kind, dilated, tmp_path):
    """All components, random weights, GSPN mounted, up to four times the sides of the training, not square."""
    pipeline = request.getfixturevalue(kind)
    adapter = make_adapter(pipeline)
    side = 8 * pipeline.vae_scale_factor
    found = sample(
        pipeline, "a cat", adapter=adapter, output=tmp_path, width=side * 6, height=side * 8 // 3 // 8 * 8,
        scheduler="euler_a", upscale=UpscalingConfig(dilated=dilated), steps=6, console=QUIET,
    )  # fmt: skip
    assert adapter.mounted_on is None
    with Image.open(tmp_path / "00000.png") as image:
        assert image.size == (side * 6, side * 8 // 3 // 8 * 8)
        record = json.loads(image.text["gspn"])
    assert len(record["stages"]) == 3 and record["stages"][-1]["width"] == side * 6
    assert record["upscaling"]["dilated"] is dilated and record["prompt"] == "a cat"
    assert found.estimate.fits and len(found.estimate.stages) == 4
    assert pixels(tmp_path / "00000.png").std() > 5
    assert sorted(path.name for path in (tmp_path / "stages").iterdir()) == [
        "00000-stage1.safetensors", "00000-stage2.safetensors", "00000-stage3.safetensors", "settings.json",
    ]  # fmt: skip


def test_every_option_changes_the_image(sd, tmp_path):
    changes = [
        {}, {"skip_residual": False}, {"dilated": True}, {"space": "pixels"}, {"strengths": (0.9,)},
        {"skip_power": 0.5}, {"dilated": True, "blur": 3.0}, {"dilated": True, "dilated_power": 5.0},
    ]  # fmt: skip
    found = []
    for number, options in enumerate(changes):
        config = UpscalingConfig(**{"strengths": (0.7,), **options})
        sample(sd, "cat", output=tmp_path / str(number), width=128, height=128, **{**UPSCALE, "upscale": config})
        found.append(pixels(tmp_path / str(number) / "00000.png"))
    for i, one in enumerate(found):
        assert all(np.abs(one - other).max() > 1 for other in found[:i])


@pytest.mark.parametrize("scheduler", ["dpm++", "euler_a"])
def test_resumes_after_an_interruption(sd, tmp_path, monkeypatch, scheduler):
    options = {
        **UPSCALE, "adapter": make_adapter(sd), "width": 256, "height": 128, "number": 3, "batch_size": 2,
        "scheduler": scheduler,
    }  # fmt: skip
    sample(sd, "cat", output=tmp_path / "whole", **options)
    whole, draw_stage, calls = stage_runner.denoise, stage_runner.StageRunner._draw_stage, []

    def stops(unet, chain, latents, *args, on_step, **kwargs):
        def on_step_or_stop():
            on_step()
            calls.append(latents.shape[-1])
            if len(calls) == 6 + 1:  # in the second stage, of two steps
                raise KeyboardInterrupt

        return whole(unet, chain, latents, *args, on_step=on_step_or_stop, **kwargs)

    monkeypatch.setattr(stage_runner, "denoise", stops)
    with pytest.raises(KeyboardInterrupt):
        sample(sd, "cat", output=tmp_path / "stopped", **options)
    monkeypatch.setattr(stage_runner, "denoise", whole)
    assert options["adapter"].mounted_on is None
    kept = sorted(path.name for path in (tmp_path / "stopped/stages").glob("*.safetensors"))
    assert kept == ["00000-stage1.safetensors", "00001-stage1.safetensors"]

    stages = []

    def counted(self, number, before, indices, *args):
        stages.append((number, tuple(indices)))
        return draw_stage(self, number, before, indices, *args)

    monkeypatch.setattr(stage_runner.StageRunner, "_draw_stage", counted)
    found = sample(sd, "cat", output=tmp_path / "stopped", **options)
    assert stages == [(1, (0, 1)), (2, (0, 1)), (0, (2,)), (1, (2,)), (2, (2,))]
    assert found.drawn == 3
    for name in ("00000", "00001", "00002"):
        for path in (f"{name}.png", *(f"stages/{name}-stage{stage}.safetensors" for stage in (1, 2, 3))):
            assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "stopped" / path).read_bytes(), path

    # Nothing is left to do; then what is damaged is made again, and no more than that.
    stages.clear()
    assert sample(sd, "cat", output=tmp_path / "stopped", **options).drawn == 0 and not stages
    expected = (tmp_path / "stopped/00001.png").read_bytes()
    (tmp_path / "stopped/00001.png").write_bytes(expected[:500])
    content = bytearray((tmp_path / "stopped/stages/00000-stage3.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "stopped/stages/00000-stage3.safetensors").write_bytes(content)
    (tmp_path / "stopped/stages/00001-stage2.safetensors").write_bytes(b"broken")
    assert sample(sd, "cat", output=tmp_path / "stopped", **options).drawn == 1
    assert stages == [(1, (0, 1)), (2, (0, 1))]
    assert (tmp_path / "stopped/00001.png").read_bytes() == expected
    stages.clear()
    with Image.open(tmp_path / "stopped/00001.png") as image:
        image.save(tmp_path / "stopped/00001.png", pnginfo=None)  # whole, and of no one knows what
    assert sample(sd, "cat", output=tmp_path / "stopped", **options).drawn == 1 and not stages
    assert (tmp_path / "stopped/00001.png").read_bytes() == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "dog"}, "prompts="),
        ({"steps": 7}, "steps=6, and this run has 7"),
        ({"seed": 1}, "seed=0, and this run has 1"),
        ({"width": 120}, "width=128, and this run has 120"),
        ({"guidance": 2.0}, "guidance=5.0"),
        ({"negative": "dog"}, "negative=None"),
        ({"scheduler": "euler"}, "scheduler='DDIMScheduler'"),
        ({"upscale": UpscalingConfig(strengths=(0.5,))}, "strengths="),
        ({"upscale": UpscalingConfig(skip_residual=False)}, "skip_residual=True"),
        ({"upscale": False}, "holds upscaled images; use another output"),
        ({"adapter": "other weights"}, "adapter=None"),
        ({"pipeline": "other weights"}, "weights="),
    ],
)
def test_other_settings_are_refused(sd, upscaled, tmp_path, changes, message):
    options = {**UPSCALE, "width": 128, "height": 64}
    pipeline, adapter = sd, None
    if "adapter" in changes:
        adapter = make_adapter(sd)
    if changes.pop("pipeline", None):
        pipeline = make_sd(tmp_path)
        pipeline.unet.conv_in.weight.data += 1e-3
    changes = {**options, **changes, "adapter": adapter}
    with pytest.raises(UsageError, match=message):
        sample(pipeline, changes.pop("prompt", "cat"), output=upscaled, **changes)


def test_settings_do_not_depend_on_the_process(sd, upscaled):
    # diffusers lists the options left at their defaults in the order of a set, which differs between processes.
    assert "_use_default_values" in sd.scheduler.config
    options = json.loads((upscaled / "stages/settings.json").read_text())["scheduler_options"]
    assert options["beta_start"] == "0.00085" and not [key for key in options if key.startswith("_")]


def test_retrained_adapters_are_noticed(sd, tmp_path):
    options = {**UPSCALE, "width": 128, "height": 64, "output": tmp_path}
    adapter = make_adapter(sd)
    sample(sd, "cat", adapter=adapter, **options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(1e-3)
    with pytest.raises(UsageError, match="weights="):
        sample(sd, "cat", adapter=adapter, **options)


def test_damaged_settings(sd, tmp_path):
    options = {**UPSCALE, "width": 128, "height": 64, "output": tmp_path}
    sample(sd, "cat", **options)
    (tmp_path / "stages/settings.json").write_text("{")
    with pytest.raises(UsageError, match="is damaged; remove"):
        sample(sd, "cat", **options)


def test_segments_are_the_longer_sides_of_the_first_stage(sd):
    text = encode_prompts(sd, ["red"])

    def segments(wanted=None):
        return segments_beyond(sd.unet, text, height=64, width=96, factor=8, segment_scans=wanted)

    assert segments() == segments(True) == {}
    adapter = make_adapter(sd)
    with adapter.mounted(sd.unet):
        assert segments() == segments(True) == {n: 6 if n.startswith("mid") else 12 for n in adapter.mixers}
        assert segments(False) == {}
        adapter.set_reference_lines({"mid": 4})
        assert segments() == {name: 12 for name in adapter.mixers if not name.startswith("mid")}
        assert segments(True).keys() == adapter.mixers.keys()
    assert all(not mixer._forward_pre_hooks for mixer in adapter.mixers.values())


def test_segments_are_set_and_restored(sd):
    plain, segmented = make_adapter(sd), make_adapter(sd, segment={"down": 3, "mid": 2, "up": 3})
    noisy, text = torch.randn(1, 4, 8, 12), encode_prompts(sd, ["red"])

    def run():
        with torch.no_grad():
            return sd.unet(noisy, 10, text.states).sample

    with segmented.mounted(sd.unet):
        wanted = run()
    with plain.mounted(sd.unet):
        before = run()
        lines = {name: 2 if name.startswith("mid") else 3 for name in plain.mixers}

        def fail():
            with segmented_scans(sd.unet, lines):
                assert torch.equal(run(), wanted)
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert torch.equal(run(), before)
    assert not torch.allclose(before, wanted)
    with segmented.mounted(sd.unet), segmented_scans(sd.unet, dict.fromkeys(segmented.mixers, 100)):
        assert torch.equal(run(), wanted)  # those that restart sooner by themselves do so


def test_scans_are_segmented_beyond_the_first_stage(sd, tmp_path, monkeypatch):
    seen = []
    plain = GSPNTokenMixer.forward

    def watched(self, hidden_states, *args, map_size=None, **kwargs):
        if not isinstance(hidden_states, torch._subclasses.FakeTensor):
            seen.append((max(map_size), self.scan.segment))
        return plain(self, hidden_states, *args, map_size=map_size, **kwargs)

    monkeypatch.setattr(GSPNTokenMixer, "forward", watched)
    options = {"adapter": make_adapter(sd), "height": 128, "width": 128, "steps": 4, "device": "cpu", "check": False}
    sample(sd, "red", output=tmp_path / "with", upscale=True, **options)
    # Trained at 8 latent pixels, drawn at 8 and 16; the level below has half of that.
    assert set(seen) == {(8, None), (4, None), (16, 8), (8, 4)}
    seen.clear()
    sample(sd, "red", output=tmp_path / "without", upscale=UpscalingConfig(segment_scans=False), **options)
    assert set(seen) == {(8, None), (4, None), (16, None)}
    first, second = (Image.open(tmp_path / one / "00000.png").tobytes() for one in ("with", "without"))
    assert first != second


def test_an_adapter_over_a_normalized_axis_needs_no_restarts(sd, tmp_path):
    adapter = make_adapter(sd, reference_lines={"down": 8, "mid": 4, "up": 8})
    options = {"adapter": adapter, "height": 128, "width": 128, "steps": 4, "device": "cpu", "check": False}

    def drawn(name, segment_scans=None):
        sample(sd, "red", output=tmp_path / name, upscale=UpscalingConfig(segment_scans=segment_scans), **options)
        return Image.open(tmp_path / name / "00000.png").tobytes()

    alone, restarted = drawn("alone"), drawn("with", True)
    assert alone == drawn("without", False) != restarted
    # Where they restart after as many lines as in training, lam is as it is.
    adapter.set_reference_lines(None)
    assert drawn("paper") == restarted

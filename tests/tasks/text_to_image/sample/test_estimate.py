"""The estimate of a run against what a real one takes, and offloading to host memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from diffusers_support import inputs, make_unet
from gspn._errors import UsageError
from gspn.diffusers import GSPNAdapter
from gspn.tasks.core.devices import Processes
from gspn.tasks.text_to_image.conditioning import Conditioning, encode_prompts, unet_arguments
from gspn.tasks.text_to_image.decoding import tiles, to_pixels
from gspn.tasks.text_to_image.sample import SampleRequest, estimate, sampling
from gspn.tasks.text_to_image.sample.estimate import CostTracker, decoder_cost, estimate_stages, unet_cost
from gspn.tasks.text_to_image.sample.offload import offloaded_skips
from gspn.tasks.text_to_image.sample.progressive_upscaling import Stage, UpscalingConfig
from gspn.tasks.text_to_image.sample.sampling import RunPlan, sample
from tasks.text_to_image.t2i_support import make_adapter, make_sd, make_vae

CPU = torch.device("cpu")
TEXT = Conditioning(torch.zeros(1, 8, 24), torch.zeros(1, 16))


def expected(unet, height, width, **options):
    options = {"factor": 8, "batch": 2, "device": CPU, **options}
    return unet_cost(unet, TEXT, height=height * 8, width=width * 8, **options)


@torch.no_grad()
def tracked(unet, height, width, batch=2):
    # What the call is given is alive too, and allocated outside.
    with CostTracker(CPU) as tracker:
        latents = torch.zeros(batch, 4, height, width)
        text = Conditioning(torch.zeros(batch, 8, 24), torch.zeros(batch, 16))
        unet(latents, 1, **unet_arguments(unet, text, height * 8, width * 8), return_dict=False)
    return tracker.cost


@pytest.mark.parametrize("mounted", [False, True])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "tiny"])
def test_expected_is_what_is_tracked(name, mounted):
    unet = make_unet(name)
    if mounted:
        GSPNAdapter.from_model(unet).mount(unet)
    size = (24, 40) if mounted == (name == "sdxl") else (33, 17)
    guess, real = expected(unet, *size), tracked(unet, *size)
    assert guess.peak_bytes == pytest.approx(real.peak_bytes, rel=0.15)
    assert guess.flops == real.flops
    assert real.peak_bytes > 2 * 4 * 4 * size[0] * size[1] * unet.config.block_out_channels[0]


def test_operations_are_those_of_the_flop_counter():
    unet = make_unet("sd15")
    GSPNAdapter.from_model(unet, layers=["down.0"]).mount(unet)
    given = inputs(unet, 16, 24)
    with CostTracker(CPU) as tracker, torch.no_grad():
        unet(**given)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(**given)
    assert tracker.cost.flops == counter.get_total_flops() > 0


def test_gspn_is_linear_and_attention_is_not():
    unet = make_unet("sd15")
    sides = (32, 128)
    attention = [expected(unet, side, side) for side in sides]
    GSPNAdapter.from_model(unet).mount(unet)
    gspn = [expected(unet, side, side) for side in sides]
    assert gspn[1].flops / gspn[0].flops == pytest.approx(16, rel=0.04)
    assert gspn[1].peak_bytes / gspn[0].peak_bytes == pytest.approx(16, rel=0.1)
    assert attention[1].flops / attention[0].flops > 50
    # The quadratic term in full: queries by keys, and their weights by values, at 128 x 128 alone.
    pairs = 5 * 128**4 * 16 * 2 * 2 * 2
    assert attention[1].flops > pairs
    # Flash attention does not write the matrix.
    assert attention[1].peak_bytes < 128**4 * 4


def test_nothing_of_the_model_is_changed():
    unet = make_unet("tiny")
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    expected(unet, 512, 512)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert not any(type(value).__name__ == "FakeTensor" for value in unet.parameters())
    assert tracked(unet, 8, 8).peak_bytes > 0


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("factor", [4, 8])
def test_decoding(sd, factor, tiled, monkeypatch):
    vae = make_vae(factor)
    monkeypatch.setattr(sd, "vae", vae)
    monkeypatch.setattr("gspn.tasks.text_to_image.decoding.MIN_TILE", 64)
    latents = torch.zeros(1, 4, 288 // factor, 160 // factor)
    with tiles(vae, tiled), CostTracker(CPU) as tracker:
        shape = to_pixels(sd, latents).shape
    assert shape == (1, 3, 288, 160)
    guess = decoder_cost(vae, height=288, width=160, tiled=tiled, device=CPU)
    assert guess.peak_bytes == pytest.approx(tracker.cost.peak_bytes, rel=0.15)
    assert guess.flops == pytest.approx(tracker.cost.flops, rel=0.15)
    assert not vae.use_tiling and vae.tile_sample_min_size == 32


def test_tiles_take_less_and_show_about_the_same(sd):
    vae = sd.vae
    latents = torch.randn(1, 4, 48, 32, generator=torch.Generator().manual_seed(0))
    whole = to_pixels(sd, latents)
    with tiles(vae, True, side=128):
        assert (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size) == (True, 128, 16)
        tiled = to_pixels(sd, latents)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    # Untrained, its attention and its norms see other surroundings.
    assert torch.corrcoef(torch.stack([tiled.flatten(), whole.flatten()]))[0, 1] > 0.8
    with pytest.raises(RuntimeError), tiles(vae, True):
        raise RuntimeError
    assert not vae.use_tiling
    big = {"height": 4096, "width": 4096, "device": CPU}
    assert decoder_cost(vae, tiled=True, **big).peak_bytes < 0.4 * decoder_cost(vae, tiled=False, **big).peak_bytes


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("mounted", [False, True])
def test_offloaded_skips_change_nothing(name, mounted):
    unet = make_unet(name)
    if mounted:
        GSPNAdapter.from_model(unet).mount(unet)
    given = inputs(unet, 12, 20)
    hooks = sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in unet.modules())
    with torch.no_grad():
        before = unet(**given).sample
        with offloaded_skips(unet, storage="cpu"):
            assert torch.equal(unet(**given).sample, before)
        assert torch.equal(unet(**given).sample, before)
        with pytest.raises(RuntimeError), offloaded_skips(unet, storage="cpu"):
            raise RuntimeError
    assert hooks == sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in unet.modules())


@pytest.mark.parametrize(("name", "share"), [("sd15", 0.95), ("sdxl", 0.85)])
def test_offloaded_skips_take_less_on_a_gpu(name, share):
    """On fake tensors, which may be on a device that is not there."""
    unet = make_unet(name)
    GSPNAdapter.from_model(unet).mount(unet)
    device = torch.device("cuda")
    whole = expected(unet, 64, 96, device=device)
    less = expected(unet, 64, 96, device=device, offload=True)
    assert less.peak_bytes < share * whole.peak_bytes
    assert less.flops == whole.flops


def test_offloading_changes_nothing(sd, tmp_path, monkeypatch):
    """With hooks around whole models and with the UNet's skip tensors elsewhere, all on one device here."""
    options = {"width": 128, "height": 64, "steps": 4, "console": Console(quiet=True), "adapter": make_adapter(sd)}
    sample(sd, "cat", output=tmp_path / "plain", upscale=True, **options)
    monkeypatch.setattr(sampling, "_check_offload", lambda offload, device: None)
    sample(sd, "cat", output=tmp_path / "waiting", upscale=UpscalingConfig(), offload="all", **options)
    assert options["adapter"].mounted_on is None and not sd._all_hooks and not hasattr(sd.unet, "_hf_hook")
    for name in ("00000.png", "stages/00000-stage2.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "waiting" / name).read_bytes()
    sd.enable_model_cpu_offload(device="cpu")
    with pytest.raises(UsageError, match=r"models are offloaded; call its remove_all_hooks\(\)"):
        sample(sd, "cat", output=tmp_path / "hooked", **options)
    sd.remove_all_hooks()


def test_what_cannot_be_offloaded(sd, tmp_path):
    for what in ("model", "activations", "all"):
        with pytest.raises(UsageError, match=f"'{what}': the run is on the CPU, which has nothing to offload to"):
            sample(sd, "cat", output=tmp_path, offload=what, device="cpu")
    with pytest.raises(UsageError, match="'disk' is unknown; use one of none, auto"):
        sample(sd, "cat", output=tmp_path, offload="disk")
    with pytest.raises(UsageError, match="skip tensors are in host memory already"), offloaded_skips(sd.unet):
        pass


def test_all_stages_are_counted(sd):
    text = encode_prompts(sd, ["cat"])
    stages = (Stage(64, 64, 6), Stage(128, 128, 2, 0.4, 2))

    def counted(split=False, processes=1, rows=False, **options):
        config = UpscalingConfig(**options)
        request = SampleRequest(
            model=sd, prompts=("cat",), output=Path("none"), number=3, batch_size=2, upscale=config, shard_image=rows
        )  # fmt: skip
        those = Processes(CPU, 0, processes)
        return estimate_stages(RunPlan(request, sd, None, those, "fp32", stages, text, text, False, "none", split, {}))

    first, second, decoding = counted()
    one = unet_cost(sd.unet, text, height=64, width=64, factor=8, batch=4, device=CPU)
    assert first.flops == one.flops * 6 * 2
    assert one.peak_bytes < first.peak_bytes < 1.5 * one.peak_bytes
    assert decoding.flops == 3 * decoder_cost(sd.vae, height=128, width=128, tiled=False, device=CPU).flops
    halved = counted(split=True)
    assert halved[1].flops == second.flops and halved[1].peak_bytes < 0.6 * second.peak_bytes
    more = counted(dilated=True, space="pixels")
    assert more[0] == first and more[1].flops > 1.5 * second.flops
    # The first of two processes draws the first of two batches; or half of the rows of both.
    images, rows = counted(processes=2), counted(processes=2, rows=True)
    assert images[1].flops == rows[1].flops == second.flops / 2
    assert images[1].peak_bytes == second.peak_bytes and rows[1].peak_bytes < 0.6 * second.peak_bytes
    assert (images[2].flops, rows[2].flops) == (decoding.flops * 2 / 3, decoding.flops)


def test_short_memory(sd, tmp_path, monkeypatch):
    quiet = Console(quiet=True)
    options = {"width": 512, "height": 256, "steps": 2, "console": quiet, "tiling": "off"}
    needed = sample(sd, "cat", output=tmp_path / "a", estimate_only=True, **options).estimate
    assert not (tmp_path / "a").exists()
    assert needed.seconds > 0 and needed.fits
    peak = max(stage.peak_bytes for stage in needed.stages)
    adapter = make_adapter(sd)
    monkeypatch.setattr(estimate, "free_memory", lambda device: peak // 20)
    with pytest.raises(
        UsageError, match=r"at 512x256 needs about .* MB, and .* MB are free on cpu: draw a smaller"
    ) as why:
        sample(sd, "cat", adapter=adapter, output=tmp_path / "a", **options)
    for remedy in ("--tiling on", "--precision bf16", "--no-check"):
        assert remedy in str(why.value)
    assert "--offload" not in str(why.value)
    assert adapter.mounted_on is None and not (tmp_path / "a/00000.png").exists()
    assert not sample(sd, "cat", output=tmp_path / "a", estimate_only=True, **options).estimate.fits
    sample(sd, "cat", output=tmp_path / "a", check=False, **options)
    assert (tmp_path / "a/00000.png").is_file()


def test_guidance_is_split_where_memory_is_short(sd, tmp_path, monkeypatch):
    options = {
        "width": 192, "height": 192, "steps": 2, "console": Console(quiet=True), "tiling": "off",
        "upscale": UpscalingConfig(strengths=(0.9,)), "number": 12, "batch_size": 12,
    }  # fmt: skip
    whole, split = (
        sample(sd, "cat", output=tmp_path / "a", split_guidance=one, estimate_only=True, **options).estimate
        for one in (False, True)
    )
    peaks = [max(stage.peak_bytes for stage in one.stages if stage.steps) for one in (split, whole)]
    assert split.stages[-1].peak_bytes < 0.9 * peaks[1] and peaks[0] < 0.7 * peaks[1]
    monkeypatch.setattr(estimate, "free_memory", lambda device: int(0.95 * peaks[1]))
    batches = []

    def note(_module, args, _found):
        if type(args[0]) is torch.Tensor:  # and none of an estimate
            batches.append(len(args[0]))

    with sd.unet.conv_in.register_forward_hook(note):
        found = sample(sd, "cat", output=tmp_path / "b", **options)
    assert found.estimate.fits and set(batches) <= {1, 12} and batches.count(12) == 2 * 4
    monkeypatch.undo()
    # A run that continues keeps to it, however much memory is free by now.
    assert sample(sd, "cat", output=tmp_path / "b", **options).drawn == 0
    with pytest.raises(UsageError, match="split_guidance=True, and this run has False"):
        sample(sd, "cat", output=tmp_path / "b", split_guidance=False, check=False, **options)


def test_free_memory_is_a_number():
    assert 2**20 < estimate.free_memory(CPU) < 2**62


def test_factors(tmp_path):
    assert make_sd(tmp_path, factor=4).vae_scale_factor == 4
    assert make_sd(tmp_path).vae_scale_factor == 8

"""The denoiser: its published sizes, its interface, and its life as a component of diffusers."""

import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("diffusers.models")

from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler

from gspn.models import GSPNDenoiser2DModel
from gspn.models.denoiser import SIZES


def small(**options):
    torch.manual_seed(0)
    options = {"in_channels": 3, "dim": 24, "num_layers": 4, "num_class_embeds": 5, "sample_size": 8} | options
    model = GSPNDenoiser2DModel(**options)
    # What starts at zero would hide everything else.
    ends = [block.out_proj if block.modulation is None else block.modulation for block in model.blocks]
    for linear in (*ends, model.out_proj, model.norm_modulation):
        torch.nn.init.normal_(linear.weight, std=0.1)
    return model.eval()


@pytest.mark.parametrize(("size", "millions"), [("B", 137), ("L", 443), ("XL", 690)])
@pytest.mark.parametrize("patch", [2, 4])
def test_published_parameter_counts(size, patch, millions):
    with torch.device("meta"):
        model = GSPNDenoiser2DModel.from_size(f"{size}/{patch}", out_channels=8)
    count = model.num_parameters() - model.class_embedding.embedding_table.weight.numel()
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_blocks_are_as_published():
    with torch.device("meta"):
        model = GSPNDenoiser2DModel.from_size("S/2")
    assert (len(model.blocks), len(model.skips)) == (25, 12)
    mixer = model.blocks[0].mixer
    assert (mixer.proxy_dim, mixer.groups, mixer.skip_proj, mixer.segment) == (368 // 16, 368, None, None)


@pytest.mark.parametrize("size", ["B", "B/0", "M/2", "b/2", "B/two", ""])
def test_sizes_that_do_not_exist(size):
    with pytest.raises(ValueError, match="use one of T, S, B, L, XL"):
        GSPNDenoiser2DModel.from_size(size)


def test_from_size_takes_further_arguments():
    model = GSPNDenoiser2DModel.from_size("T/4", dim=16, num_layers=2, in_channels=1)
    assert (model.config.dim, model.config.patch_size, model.config.num_layers) == (16, 4, 2)
    assert GSPNDenoiser2DModel.from_size("T/2").config.dim == SIZES["T"]["dim"]


@pytest.mark.parametrize("mixer", ["gspn", "attention"])
@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 8, 8), (3, 6, 14), (0, 4, 4)])
def test_any_height_and_width(mixer, shape):
    batch, height, width = shape
    model = small(mixer=mixer, out_channels=6)
    noisy = torch.randn(batch, 3, height, width)
    out = model(noisy, timestep=torch.arange(batch), class_labels=torch.arange(batch)).sample
    assert out.shape == (batch, 6, height, width)
    assert torch.isfinite(out).all()


def test_a_patch_that_does_not_divide():
    with pytest.raises(ValueError, match="multiples of patch=2"):
        small()(torch.randn(1, 3, 8, 7), timestep=torch.tensor([1]), class_labels=torch.tensor([0]))


def test_time_class_and_place_all_matter():
    model, noisy = small(), torch.randn(1, 3, 8, 8)

    def out(t=10, label=1, x=noisy):
        return model(x, timestep=torch.tensor([t]), class_labels=torch.tensor([label])).sample

    first = out()
    assert not torch.allclose(first, out(t=500))
    assert not torch.allclose(first, out(label=2))
    # One corner reaches the opposite one: the scans are global.
    moved = noisy.clone()
    moved[..., 0, 0] += 1
    assert not torch.equal(out(x=moved)[..., -1, -1], first[..., -1, -1])


def test_a_scalar_timestep_and_labels_beyond_the_classes():
    model, noisy = small(), torch.randn(2, 3, 4, 4)
    given = model(noisy, timestep=torch.tensor([7, 7]), class_labels=torch.tensor([5, 5])).sample
    # DiTPipeline says 1000 for "no class", whatever the classes are.
    for labels in (torch.tensor([1000, 1000]), None):
        torch.testing.assert_close(model(noisy, timestep=7, class_labels=labels).sample, given, rtol=0, atol=0)
    assert torch.equal(model(noisy, 7, None, return_dict=False)[0], given)


def test_models_without_classes():
    model, noisy = small(num_class_embeds=None), torch.randn(1, 3, 4, 4)
    assert model(noisy, timestep=3).sample.shape == noisy.shape
    with pytest.raises(ValueError, match="no classes"):
        model(noisy, timestep=3, class_labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="class_dropout_prob=0"):
        small(class_dropout_prob=0.0)(noisy, timestep=3)


def test_labels_are_dropped_in_training_alone():
    model, noisy = small(class_dropout_prob=1.0), torch.randn(2, 3, 4, 4)
    labels, none = torch.tensor([0, 1]), torch.tensor([5, 5])
    assert not torch.allclose(model(noisy, 3, labels).sample, model(noisy, 3, none).sample)
    model.train()
    torch.testing.assert_close(model(noisy, 3, labels).sample, model(noisy, 3, none).sample)


@pytest.mark.parametrize("ada_norm", [False, True])
@pytest.mark.parametrize("mixer", ["gspn", "attention"])
def test_blocks_begin_as_the_identity_and_all_of_them_learns(mixer, ada_norm):
    torch.manual_seed(0)
    options = {"in_channels": 3, "dim": 16, "num_layers": 2, "num_class_embeds": 2, "class_dropout_prob": 0.0}
    model = GSPNDenoiser2DModel(**options, mixer=mixer, ada_norm=ada_norm, scan={"skip": True})
    x, embedding = torch.randn(2, 16, 4, 4), torch.randn(2, 16)
    assert all(torch.equal(block(x, embedding), x) for block in model.blocks)

    # What ends the network learns first, then what ends the blocks, then the rest.
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    noisy, target, labels = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    for _ in range(4):
        optimizer.zero_grad()
        (model(noisy, torch.tensor([10, 900]), labels).sample - target).square().mean().backward()
        optimizer.step()
    # The bias of a key adds the same to every score of a query, which softmax does not see.
    still = [name for name, p in model.named_parameters() if p.grad.abs().max() < 1e-9 and "qkv.bias" not in name]
    assert still == []


@pytest.mark.parametrize("mixer", ["gspn", "attention"])
def test_checkpointing_gives_the_same_gradients(mixer):
    noisy, labels = torch.randn(2, 3, 4, 6), torch.tensor([0, 1])

    def gradients(checkpointing):
        model = small(mixer=mixer, ada_norm=True)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(noisy, torch.tensor([3, 900]), labels).sample.square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) > 30
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {"mixer": "convolution"}, {"dim": 0}, {"patch_size": 0}, {"in_channels": 0}, {"num_layers": 0},
        {"num_class_embeds": 0}, {"scan": {"segment": 0}}, {"scan": {"groups": 5}},
        {"scan": {"reference_lines": 0}},
    ],
)  # fmt: skip
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options.get("scan", options)))):
        small(**options)


def test_options_reach_the_scans():
    model = small(scan={"groups": 1, "segment": 2, "skip": True, "alignment": "official"}, proxy_dim=3)
    mixer = model.blocks[2].mixer
    assert (mixer.groups, mixer.segment, mixer.alignment, mixer.proxy_dim) == (1, 2, "official", 3)
    assert mixer.skip_proj is not None


def test_compiles_as_one_graph():
    model = small(dim=8, num_layers=2)
    noisy, t, labels = torch.randn(2, 3, 4, 6), torch.tensor([3, 900]), torch.tensor([0, 1])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(noisy, t, labels).sample, model(noisy, t, labels).sample)


def test_saved_and_loaded_is_the_same(tmp_path):
    scan = {"segment": 2, "reference_lines": 5}
    model = small(scan=scan, mixer="gspn")
    model.save_pretrained(tmp_path)
    again = GSPNDenoiser2DModel.from_pretrained(tmp_path)
    noisy, t, labels = torch.randn(2, 3, 4, 6), torch.tensor([3, 900]), torch.tensor([0, 1])
    assert torch.equal(again(noisy, t, labels).sample, model(noisy, t, labels).sample)
    assert again.config.scan == scan
    assert not torch.equal(small(scan={"segment": 2})(noisy, t, labels).sample, model(noisy, t, labels).sample)


def test_a_pipeline_of_diffusers_in_another_process(tmp_path):
    model = small(in_channels=4, out_channels=8, num_class_embeds=10)
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    pipeline = DiTPipeline(model, vae, DDIMScheduler(), id2label={0: "cat", 1: "dog"})
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([0, 1], generator=torch.manual_seed(0), num_inference_steps=3, output_type="np").images
    pipeline.save_pretrained(tmp_path / "pipeline")
    torch.save(torch.tensor(images), tmp_path / "images.pt")
    program = f"""
import sys, torch, gspn.models
assert "diffusers" not in sys.modules  # the models of timm do not need it
assert gspn.models.GSPNDenoiser2DModel.__module__ == "gspn.models.denoiser"
import gspn.diffusers
assert gspn.diffusers.GSPNDenoiser2DModel is gspn.models.GSPNDenoiser2DModel
torch.set_num_threads(1)  # the same sums
from diffusers import DiTPipeline, {DPMSolverMultistepScheduler.__name__} as Other
pipeline = DiTPipeline.from_pretrained({str(tmp_path / "pipeline")!r})
pipeline.set_progress_bar_config(disable=True)
images = pipeline([0, 1], generator=torch.manual_seed(0), num_inference_steps=3, output_type="np").images
assert torch.equal(torch.tensor(images), torch.load({str(tmp_path / "images.pt")!r}, weights_only=True))
pipeline.scheduler = Other.from_config(pipeline.scheduler.config)
assert pipeline([1], num_inference_steps=2, guidance_scale=1.0, output_type="np").images.shape == (1, 8, 8, 3)
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("sample_size", "in_channels", "out_channels", "patch_size", "dim", "num_layers",
                                     "proxy_dim", "num_class_embeds") for value in ("8", 8.0, True, 0, -1, [8])),
        *((name, value) for name in ("class_dropout_prob", "drop_path")
          for value in ("0.1", -0.1, 1.1, math.nan, None)),
        ("ada_norm", "false"), ("mixer", ["gspn"]), ("scan", []), ("scan", {"segments": 3}), ("scan", {"dim": 3}),
    ],
)  # fmt: skip
def test_options_of_a_damaged_configuration(name, value):
    with pytest.raises(ValueError, match=rf"^{name}"):
        GSPNDenoiser2DModel.from_config({"in_channels": 3, "dim": 24, "num_layers": 2, name: value})


def test_options_are_passed_by_name():
    with pytest.raises(TypeError, match="positional"):
        GSPNDenoiser2DModel(32, 3)  # type: ignore[misc]


LAYERS = ["in_proj", "mid_proj", "out_proj", "mixer.proxy", "skips.0"]


@pytest.fixture
def lora(tmp_path):
    """A model with a LoRA, its output before and with it, and a call that computes it."""
    peft = pytest.importorskip("peft")
    model, noisy = small(scan={"skip": True}), torch.randn(2, 3, 8, 8)

    def run(one=model):
        with torch.no_grad():
            return one(noisy, torch.tensor([3, 900]), torch.tensor([0, 1])).sample

    before = run()
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=LAYERS, init_lora_weights=False))
    return model, run, before


def test_a_lora_reaches_the_layers_that_the_docs_name(lora):
    model, run, before = lora
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {name for name, _ in model.named_modules() if name.endswith(tuple(LAYERS))} and len(adapted) == 22
    added = run()
    assert not torch.allclose(added, before)
    model.disable_adapters()
    assert torch.equal(run(), before)
    model.enable_adapters()
    assert torch.equal(run(), added)
    model.delete_adapters("default")
    assert torch.equal(run(), before)


def test_a_lora_is_trained_saved_and_loaded_alone(lora, tmp_path):
    model, run, _ = lora
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    model(torch.randn(1, 3, 4, 4), torch.tensor([3]), torch.tensor([0])).sample.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    added, other = run(), small(scan={"skip": True})
    safe = {"prefix": None, "adapter_name": "mine", "use_safetensors": True}
    model.save_lora_adapter(tmp_path)
    other.load_lora_adapter(tmp_path, **safe)
    assert torch.equal(run(other), added)
    other.fuse_lora()
    torch.testing.assert_close(run(other), added)
    other.unfuse_lora()
    other.unload_lora()
    assert list(other.state_dict()) == list(small(scan={"skip": True}).state_dict())
    other.load_lora_adapter(tmp_path, **safe)
    other.set_adapters("mine", 0.0)
    torch.testing.assert_close(run(other), lora[2])  # fused and taken out again, it left its rounding

"""Distillation runs: they learn, write what they say, and end the same after a kill."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from gspn._errors import UsageError
from gspn.diffusers import GSPNAdapter
from gspn.tasks.text_to_image.distill import DistillConfig, distill
from gspn.tasks.text_to_image.pipelines import load_adapter, load_pipeline
from gspn.tasks.text_to_image.sample import sample
from tasks.processes import start_many
from tasks.runs import assert_same, newest_state, rows, stopped_before
from tasks.text_to_image.t2i_runs import make_folder, tiny_distill
from tasks.text_to_image.t2i_support import make_sd, make_sdxl

BLOCKS_FIRST = ["run.checkpoint_every_s=0", "data.hflip=0.5", "distillation.block_epochs=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher and a data set."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("distill")
    make_folder(place / "images")
    make_sd(place, factor=4).save_pretrained(place / "teacher")
    return place


@pytest.fixture(scope="module")
def trained(place):
    # From where there is most to learn.
    settings = ["schedule.epochs=8", "samples.every=4", "distillation.relative=true", "model.initialize=copy"]
    return distill(tiny_distill(place / "teacher", place / "images", place / "run", *settings))


@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted run whose first epoch trains layers separately."""
    return distill(tiny_distill(place / "teacher", place / "images", place / "whole", *BLOCKS_FIRST)).output


def test_it_learns_and_writes(trained):
    table = rows(trained.output)
    assert len(table) == 8
    assert float(table[-1]["eval_attention"]) < 0.8 * float(table[0]["eval_attention"])
    assert float(table[-1]["eval_teacher"]) < float(table[0]["eval_teacher"])
    last = trained.last
    whole = last.eval_noise + 0.5 * last.eval_teacher + 0.5 * last.eval_attention
    assert last.ema_loss == pytest.approx(whole, rel=1e-6)
    assert [path.name for path in sorted((trained.output / "samples").iterdir())] == [
        "epoch-00004.png",
        "epoch-00008.png",
    ]


def test_some_layers_learn_alone(place, trained, tmp_path):
    start = [f"model.init_from={trained.output / 'last'}", 'distillation.layers=["up"]']
    result = distill(tiny_distill(place / "teacher", place / "images", tmp_path / "run", *start))
    before, after = (load_adapter(one / "last").state_dict() for one in (trained.output, result.output))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    up = {name for name in before if name.startswith("up_blocks")}
    assert changed == up and len(up) < len(before)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_back_the_latents(prediction):
    from gspn.tasks.text_to_image.distill.training import Distillation
    from tasks.text_to_image.t2i_support import make_scheduler

    scheduler = DDPMScheduler.from_config(make_scheduler(prediction).config)
    start = torch.randn(64, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    noisy, t, target = Distillation.noised(SimpleNamespace(scheduler=scheduler), start)
    assert t.max() > 800 and t.min() < 200
    a = scheduler.alphas_cumprod[t].sqrt()[:, None, None, None]
    b = (1 - a.square()).sqrt()
    back = (noisy - b * target) / a if prediction == "epsilon" else a * noisy - b * target
    torch.testing.assert_close(back, start, atol=1e-4, rtol=1e-3)


def test_the_adapter_is_the_average_and_draws(trained, place, tmp_path):
    adapter = load_adapter(trained.output)
    state = newest_state(trained.output)
    average = {key.removeprefix("ema.module.adapter."): value for key, value in state.items() if key.startswith("ema.")}
    assert_same(adapter.state_dict(), average)
    found = sample(
        str(place / "teacher"), "red", adapter=str(trained.output), output=tmp_path / "drawn", steps=2, device="cpu"
    )
    assert found.drawn == 1
    pipeline = load_pipeline(place / "teacher")
    adapter.mount(pipeline.unet)


@pytest.mark.parametrize(("precision", "fused"), [("fp32", True), ("bf16", False)])
def test_the_student_in_bfloat16_on_a_cpu_attends_plainly(precision, fused, place, tmp_path, monkeypatch):
    """The backward pass of fused attention is slow there; the teacher has none."""
    trained_with, without, attention = [], [], torch.nn.functional.scaled_dot_product_attention

    def attend(query, *args, **options):
        (trained_with if query.requires_grad else without).append(query.dtype)
        return attention(query, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    settings = [f"run.precision={precision}", "schedule.epochs=1", "samples.every=0"]
    distill(tiny_distill(place / "teacher", place / "images", tmp_path, *settings))
    assert bool(trained_with) == fused and without


@pytest.mark.parametrize("update", [3, 7])
def test_stopped_and_resumed_is_the_same_run(place, whole, tmp_path, update):
    config = tiny_distill(place / "teacher", place / "images", tmp_path, *BLOCKS_FIRST)
    with stopped_before(update):
        distill(config)
    distill(config, resume=True)
    assert_same(newest_state(tmp_path), newest_state(whole))
    assert rows(tmp_path) == rows(whole)
    name = "last/diffusion_pytorch_model.safetensors"
    assert_same(load_file(tmp_path / name), load_file(whole / name))
    samples = "samples/epoch-00002.png"
    assert (tmp_path / samples).read_bytes() == (whole / samples).read_bytes()


def share(teacher, root, output, *settings):
    from gspn.tasks.text_to_image.distill.training import Distillation

    task = Distillation(tiny_distill(teacher, root, output, *settings))
    result = task.train(resume=False, console=None)
    state = {key: value.contiguous() for key, value in task.distiller.state_dict().items()}
    save_file(state, f"{output}-{int(not result.is_main)}.safetensors")


def test_two_processes_share_the_work(place, tmp_path):
    settings = ["schedule.epochs=3", "samples.every=0", "ema.decay=null", "model.initialize=copy"]
    settings.append("data.sizes=[32, 24]")
    sources = (place / "teacher", place / "images")
    start_many(2, tmp_path / "printed", share, *sources, tmp_path / "two", *settings, "data.batch_size=2")
    distill(tiny_distill(*sources, tmp_path / "one", *settings))
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two] == ["4", "8", "12"]
    # Noise and times are drawn by each process: the same data, not the same loss to the last digit.
    assert float(two[-1]["eval_attention"]) == pytest.approx(float(one[-1]["eval_attention"]), rel=0.2)
    # The gradients of both reached both.
    mine, theirs = (load_file(tmp_path / f"two-{i}.safetensors") for i in range(2))
    assert_same(mine, theirs)
    saved = load_file(tmp_path / "two" / "last" / "diffusion_pytorch_model.safetensors")
    assert_same(saved, {key.removeprefix("adapter."): value for key, value in mine.items()})


@pytest.mark.parametrize(
    "settings",
    [
        ["model.initialize=copy", "model.proxy_bias=false", "model.groups=1", "model.proxy_dim=3"],
        ["data.sizes=[32, 40, 64]", "distillation.relative=true"],
        ["model.initialize=random", "model.segments={down: 2, up: 4}", "model.layers=[down, up]"],
        ["model.grad_checkpointing=true", "optim.accumulate=2", "data.batch_size=2", "data.workers=1"],
        ["model.weights=bf16", "run.precision=bf16", "distillation.block_epochs=1"],
        ["model.normalize_scans=false"],
    ],
)
def test_options(place, tmp_path, settings):
    settings = [*settings, "schedule.epochs=1", "samples.every=0"]
    result = distill(tiny_distill(place / "teacher", place / "images", tmp_path / "run", *settings))
    assert 0 < result.last.eval_loss < 10
    adapter = GSPNAdapter.from_pretrained(tmp_path / "run" / "last")
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    scans = {name: mixer.scan for name, mixer in adapter.mixers.items()}
    if "model.layers=[down, up]" in settings:
        assert {scan.segment for scan in scans.values()} == {2, 4}
        # Of the segment where it is shorter, so that lam is as it is in training.
        assert all(scan.reference_lines == scan.segment for scan in scans.values())
    elif "model.normalize_scans=false" in settings:
        assert {scan.reference_lines for scan in scans.values()} == {None}
    else:  # images of 32 pixels, latents of 8; the middle block has half of them
        assert {n: scan.reference_lines for n, scan in scans.items()} == {n: 4 if "mid" in n else 8 for n in scans}
    if "model.proxy_dim=3" in settings:
        assert {scan.proxy_dim for scan in scans.values()} == {3}


def test_normalized_scans_train_as_the_papers(place, whole, tmp_path):
    """The training size is that of the reference, where lam is as it is."""
    settings = [*BLOCKS_FIRST, "model.normalize_scans=false"]
    other = distill(tiny_distill(place / "teacher", place / "images", tmp_path / "run", *settings)).output
    name = "last/diffusion_pytorch_model.safetensors"
    assert_same(load_file(other / name), load_file(whole / name))


def test_stable_diffusion_xl(place, tmp_path):
    make_sdxl(tmp_path).save_pretrained(tmp_path / "teacher")
    settings = ["schedule.epochs=1", "samples.prompts=[red]", "data.sizes=[32, 64]"]
    result = distill(tiny_distill(tmp_path / "teacher", place / "images", tmp_path / "run", *settings))
    assert 0 < result.last.eval_loss < 10


def test_it_continues_from_an_adapter(place, trained, tmp_path):
    first = load_adapter(trained.output)
    settings = [
        f"model.init_from={trained.output}",
        "schedule.epochs=1",
        "optim.lr=0",
        "samples.every=0",
        "ema.decay=null",
    ]
    distill(tiny_distill(place / "teacher", place / "images", tmp_path / "run", *settings))
    assert_same(load_adapter(tmp_path / "run").state_dict(), first.state_dict())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher=nowhere", "no model_index.json"),
        ("model.layers=[sideways]", "sideways"),
        ("model.proxy_bias=false", "constant gates need it"),
        ("model.init_from=nowhere", "no config.json"),
        ("distillation.block_epochs=9", "more than schedule.epochs 2"),
        ('distillation.layers=["up.9"]', r"distillation\.layers: 'up\.9' has no self-attention"),
        ("distillation.attention=-1", "distillation.attention"),
        ("data.name=nothing", "nothing"),
        ("data.size=33", "33 is not a multiple of 4"),
        ("data.sizes=[32, 34]", "data.sizes has 34, which is not a multiple of 4"),
        ("run.fsdp=true", r"FSDP is not supported.*run\.fsdp=false"),
        ("model.weights=bf16", "need autocast"),
    ],
)
def test_what_cannot_be_met(place, tmp_path, override, message):
    with pytest.raises(UsageError, match=message):
        distill(tiny_distill(place / "teacher", place / "images", tmp_path / "run", "ema.decay=null", override))


def test_a_wrong_request_is_refused_before_anything_is_encoded(place, trained, tmp_path, monkeypatch):
    from gspn.tasks.text_to_image import caption_trainer

    def encode_data(*_args, **_kwargs):
        raise AssertionError("encoded")

    monkeypatch.setattr(caption_trainer, "encode_data", encode_data)
    sources = (place / "teacher", place / "images")
    with pytest.raises(UsageError, match="holds a run already"):
        distill(tiny_distill(*sources, trained.output))
    with pytest.raises(UsageError, match="sideways"):
        distill(tiny_distill(*sources, tmp_path / "run", "model.layers=[sideways]"))
    with pytest.raises(AssertionError, match="encoded"):
        distill(tiny_distill(*sources, tmp_path / "run"))


def test_another_teacher_does_not_resume(place, tmp_path):
    pipeline = make_sd(tmp_path, factor=4)
    pipeline.save_pretrained(tmp_path / "teacher")
    config = tiny_distill(
        tmp_path / "teacher", place / "images", tmp_path / "run", "schedule.epochs=1", "samples.every=0"
    )
    distill(config)
    with torch.no_grad():
        pipeline.unet.conv_in.weight.mul_(2)
    pipeline.save_pretrained(tmp_path / "teacher")
    with pytest.raises(UsageError, match=r"resolved\.unet"):
        distill(config, resume=True)


def test_reading_in_half_precision_loses_nothing_of_an_adapter(place):
    from gspn.tasks.text_to_image.distill.attention_matching import Distiller

    pipeline = load_pipeline(place / "teacher", dtype=torch.bfloat16)
    adapter = GSPNAdapter.from_model(pipeline.unet).float()
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    Distiller(pipeline.unet, adapter, 4)
    assert_same(adapter.state_dict(), before)


def test_presets():
    for name in DistillConfig.preset_names():
        assert isinstance(DistillConfig.load(name), DistillConfig) and DistillConfig.preset_title(name)
    blocks, together = DistillConfig.load("emoji_styles_blocks"), DistillConfig.load("emoji_styles")
    assert blocks.distillation.block_epochs == blocks.schedule.epochs and blocks.data == together.data
    assert together.model.init_from == str(blocks.run.output / "last")

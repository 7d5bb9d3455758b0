"""Training a small denoiser: it learns, writes what it says, and ends the same after a kill."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gspn._errors import UsageError
from gspn.tasks.class_conditional import ClassConditionalConfig, train
from gspn.tasks.class_conditional.model import load_pipeline
from gspn.tasks.core.config import read_yaml
from tasks.class_conditional.class_conditional_runs import tiny
from tasks.runs import assert_same, newest_state, rows, stopped_before


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("generate") / "run"
    settings = ["schedule.epochs=6", "samples.every=3", "data.eval_split=val", "run.trackers=[tensorboard]"]
    return train(tiny(output, *settings))


def test_it_learns_and_writes(trained):
    table = rows(trained.output)
    assert len(table) == 6
    assert float(table[-1]["train_loss"]) < 0.8 * float(table[0]["train_loss"])
    assert float(table[-1]["eval_loss"]) < float(table[0]["eval_loss"])
    assert trained.last.epoch == 6 and trained.last.ema_loss is not None
    assert sorted(path.name for path in (trained.output / "samples").iterdir()) == [
        "epoch-00003.png",
        "epoch-00006.png",
    ]
    with Image.open(trained.output / "samples" / "epoch-00006.png") as grid:
        assert grid.width > 2 * 48 and grid.height > 3 * 48
    assert list((trained.output / "tensorboard").rglob("events*"))
    resolved = read_yaml((trained.output / "config.yaml").read_text(), "it")["resolved"]
    assert (resolved["in_channels"], resolved["out_channels"], resolved["num_classes"]) == (1, 2, 10)


def test_the_pipeline_holds_the_average(trained):
    pipeline = load_pipeline(trained.output)
    average = {
        k.removeprefix("ema.module."): v for k, v in newest_state(trained.output).items() if k.startswith("ema.")
    }
    assert_same(pipeline.transformer.state_dict(), average)
    assert pipeline.labels["7"] == 7
    assert type(pipeline.scheduler).__name__ == "DDPMScheduler"
    assert not pipeline.transformer.training


@pytest.mark.parametrize(
    "settings",
    [
        ["diffusion.objective=flow", "diffusion.learned_sigma=false", "diffusion.sampling=logit_normal"],
        ["diffusion.objective=v_prediction", "diffusion.learned_sigma=false"],
        ["model.name=attention"],
        ["model.name=dit", "model.options={num_layers: 2, num_attention_heads: 2, attention_head_dim: 8}"],
        ["model.options={dim: 8, num_layers: 2, ada_norm: true, scan: {alignment: official}}"],
        ["data.channels=3", "model.grad_checkpointing=true", "optim.accumulate=2", "data.batch_size=16"],
    ],
)
def test_objectives_and_models(tmp_path, settings):
    settings = [*settings, "schedule.epochs=1", "samples.columns=1"]
    if not any("model.options" in one for one in settings):
        settings.append("model.options={dim: 8, num_layers: 2}")
    result = train(tiny(tmp_path / "run", *settings))
    assert 0 < result.last.train_loss < 5
    assert load_pipeline(tmp_path / "run").transformer.config.sample_size == 8


def test_labels_are_dropped_in_the_loop(tmp_path, monkeypatch):
    from gspn.tasks.class_conditional import training

    seen = []
    plain = training.DenoisingLoss.each

    def watched(self, predict, start, labels):
        seen.append(labels)
        return plain(self, predict, start, labels)

    monkeypatch.setattr(training.DenoisingLoss, "each", watched)
    train(tiny(tmp_path / "run", "model.class_dropout=0.3", "schedule.epochs=1", "samples.every=0"))
    labels = torch.cat(seen)
    assert 0.25 < (labels == 10).float().mean() < 0.35
    # Another part of them in each update.
    assert len({tuple((one == 10).tolist()) for one in seen}) == len(seen)


@pytest.mark.parametrize("sizes", ["null", "[8, 12]"])
def test_stopped_and_resumed_is_the_same_run(tmp_path, sizes):
    settings = ["run.checkpoint_every_s=0", "data.hflip=0.5", "model.options.drop_path=0.2", "data.batch_size=128"]
    settings.append(f"data.sizes={sizes}")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(tiny(whole, *settings))
    with stopped_before(16):
        train(tiny(stopped, *settings))
    train(tiny(stopped, *settings), resume=True)
    assert_same(newest_state(stopped), newest_state(whole))
    assert rows(stopped) == rows(whole)
    name = "last/transformer/diffusion_pytorch_model.safetensors"
    assert_same(load_file(stopped / name), load_file(whole / name))
    samples = "samples/epoch-00002.png"
    assert (stopped / samples).read_bytes() == (whole / samples).read_bytes()


def test_another_configuration_does_not_resume(trained):
    settings = ["schedule.epochs=6", "samples.every=3", "data.eval_split=val"]
    other = tiny(trained.output, *settings, "diffusion.beta_schedule=squaredcos_cap_v2")
    with pytest.raises(UsageError, match=r"diffusion\.beta_schedule"):
        train(other, resume=True)
    with pytest.raises(UsageError, match="holds a run already"):
        train(tiny(trained.output))


def test_it_continues_from_a_pipeline(trained, tmp_path):
    settings = ["schedule.epochs=1", f"model.init_from={trained.output}", "optim.lr=1e-12", "optim.weight_decay=0"]
    options = "model.options={dim: 16, num_layers: 2, proxy_dim: 2, scan: {reference_lines: 4}}"
    result = train(tiny(tmp_path / "run", options, *settings))
    start, end = load_pipeline(trained.output).transformer, load_pipeline(result.output).transformer
    torch.testing.assert_close(dict(end.named_parameters()), dict(start.named_parameters()))
    assert end.config["scan"] == {"reference_lines": 4}
    with pytest.raises(UsageError, match=r"init_from .* has weights of another model"):
        train(tiny(tmp_path / "other", f"model.init_from={trained.output}", "model.options={dim: 24, num_layers: 2}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("diffusion.objective=flow", "learned_sigma"),
        ("model.size=Q/2", "use one of T, S"),
        ("model.size=T/3", "do not divide the side 8"),
        ("data.sizes=[8, 9]", r"do not divide the side 9; choose another patch or data\.sizes"),
        ("model.options.colour=red", "colour"),
        ("data.name=nothing", "nothing"),
        ("samples.steps=0", "samples.steps"),
        ("model.class_dropout=1.5", "model.class_dropout"),
        ("optim.label_smoothing=0.1", "no labels to smooth"),
        ("samples.scheduler=flow", "does not fit"),
    ],
)
def test_what_cannot_be_met(tmp_path, override, message):
    with pytest.raises(UsageError, match=message):
        train(tiny(tmp_path / "run", "schedule.epochs=1", override))


def test_presets():
    names = ClassConditionalConfig.preset_names()
    assert "mnist5k" in names
    for name in names:
        assert isinstance(
            ClassConditionalConfig.load(name), ClassConditionalConfig
        ) and ClassConditionalConfig.preset_title(name)

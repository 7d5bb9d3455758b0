"""Configurations from YAML: what is refused, and how it is said."""

from __future__ import annotations

import pytest

from gspn._errors import UsageError
from gspn.tasks.autoencode import AutoencodeConfig
from gspn.tasks.class_conditional import ClassConditionalConfig
from gspn.tasks.classify import TrainConfig
from gspn.tasks.core.config import read_yaml, settings, to_mapping, write_yaml
from gspn.tasks.text_to_image.distill import DistillConfig
from gspn.tasks.text_to_image.train import TextToImageConfig


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.rl=1", "unknown configuration key 'optim.rl'; did you mean 'lr'?"),
        ("lr=1", "unknown configuration key 'lr'; did you mean 'optim.lr'?"),
        ("optim.lr=fast", "optim.lr is 'fast'; it has to be a number."),
        ("schedule.epochs=1.5", "schedule.epochs is 1.5; it has to be a whole number."),
        ("augment.scale=0.5", "augment.scale is 0.5; it has to be a list of 2: a number, a number."),
        ("run.precision=bf61", "run.precision is 'bf61', not one of fp32, bf16, fp16; did you mean 'bf16'?"),
        ("model.channels_last=perhaps", "model.channels_last is 'perhaps'; it has to be true or false."),
        ("model.drop_path=1.5", "model.drop_path is 1.5; it has to be between 0 and 1."),
        ("data.mean=[1, 2]", "data.mean is [1, 2]; it has to be a list of 3: a number, a number, a number."),
        ("epochs", "'epochs' is not of the form section.key=value, such as optim.lr=1e-3."),
        ("optim.lr=[", "the value of optim.lr is not YAML"),
        ("model=vit", "model is 'vit', not a mapping of keys to values."),
        ("schedule.warmup_epochs=400", "schedule.epochs is 300, and warm-up and cool-down alone take 400"),
    ],
)
def test_refusals(override, message):
    with pytest.raises(UsageError) as error:
        TrainConfig().changed(override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_average_and_fsdp_exclude_each_other():
    with pytest.raises(UsageError, match=r"ema\.decay=null"):
        TrainConfig().changed("run.fsdp=true", "ema.decay=0.99")


def test_mixing_needs_pairs():
    with pytest.raises(UsageError, match="even"):
        TrainConfig().changed("augment.mixup=0.1", "data.batch_size=3")


def test_numbers_as_people_write_them():
    config = TrainConfig().changed("optim.lr=1e-3", "model.kwargs.init_values=1e-6", "data.size=64", "run.output=5")
    assert config.optim.lr == 1e-3
    assert config.model.kwargs == {"init_values": 1e-6}
    assert str(config.run.output) == "5"


def test_a_nested_mapping_of_free_keys_is_merged():
    config = TrainConfig().changed("model.kwargs.depth=2").changed("model.kwargs.embed_dim=32")
    assert config.model.kwargs == {"depth": 2, "embed_dim": 32}


def test_written_and_read_again_it_is_the_same():
    config = TrainConfig.load("emoji_nano")
    assert TrainConfig.from_values(read_yaml(write_yaml(config), "it")) == config


def test_yaml_is_read_safely():
    with pytest.raises(UsageError, match="not YAML"):
        read_yaml("!!python/object/apply:os.system ['true']", "the file")


def test_a_file_is_named_in_its_errors(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lrate: 1}")
    with pytest.raises(UsageError, match=r"mine\.yaml: unknown configuration key 'optim\.lrate'"):
        TrainConfig.load(file)
    with pytest.raises(UsageError, match="cannot be read"):
        TrainConfig.load(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="did you mean 'digits_pico'"):
        TrainConfig.load("digit_pico")


FREE = {
    "run.stop_after_s",
    "data.root", "data.batch_size", "data.workers", "model.grad_checkpointing", "model.compile", "optim.accumulate",
    "run.output", "run.device", "run.deterministic", "run.checkpoint_every_s", "run.log_every", "run.trackers",
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "further"),
    [
        (TrainConfig, {"data.eval_batch_size"}),
        (ClassConditionalConfig, {"data.latents"}),
        (AutoencodeConfig, set()),
        (TextToImageConfig, {"data.cache"}),
        (DistillConfig, {"data.cache"}),
    ],
)
def test_settings_that_may_differ_when_a_run_is_resumed(kind, further):
    free = {key for key, one, _ in settings(kind()) if one.metadata.get("free")}
    assert free == FREE | further


def test_differences_from_a_saved_run():
    config = TrainConfig().changed("augment.mixup=0.1")
    saved = to_mapping(TrainConfig().changed("optim.lr=1", "run.device=cpu", "augment.re_mode=rand"))
    assert config.differences({**saved, "resolved": {"side": (1, 2)}}, {"side": [1, 3]}) == {
        "augment.mixup": (0.0, 0.1),
        "augment.re_mode": ("rand", "pixel"),
        "optim.lr": (1.0, 5e-4),
        "resolved.side": ((1, 2), [1, 3]),
    }


def test_a_run_of_version_0_1_0_is_read_under_the_present_names(tmp_path):
    config = DistillConfig().changed("model.init_from=x", "samples.steps=7", "model.segments.down_blocks=4")
    saved = to_mapping(config)
    saved["pictures"] = saved.pop("samples")
    saved["model"]["resume_from"] = saved["model"].pop("init_from")
    saved["resolved"] = {}
    assert config.differences(saved, {}) == {}
    assert DistillConfig.from_values(saved) == config
    del saved["resolved"]
    with pytest.raises(UsageError, match="unknown configuration key"):
        DistillConfig.from_values(saved)  # a file of one's own has the present names
    generate = {**to_mapping(ClassConditionalConfig()), "resolved": {}}
    generate["samples"]["sampler"] = generate["samples"].pop("scheduler")
    generate["model"]["network"] = generate["model"].pop("name")
    assert ClassConditionalConfig().differences(generate, {}) == {}
    generate["samples"]["sampler"] = "ddim"
    assert ClassConditionalConfig().differences(generate, {}) == {"samples.scheduler": ("ddim", "auto")}


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        (TrainConfig, "data.workers=-1", "data.workers is -1; it has to be between 0 and 1024."),
        (TrainConfig, "schedule.epochs=0", "schedule.epochs is 0; it has to be at least 1."),
        (TrainConfig, "optim.lr=.nan", "optim.lr is nan; it has to be a number."),
        (TrainConfig, "optim.label_smoothing=2", "optim.label_smoothing is 2; it has to be between 0 and 1."),
        (TrainConfig, "run.trackers=[paper]", "run.trackers is 'paper', not one of tensorboard"),
        (ClassConditionalConfig, "data.hflip=1.5", "data.hflip is 1.5; it has to be between 0 and 1."),
        (
            ClassConditionalConfig,
            "diffusion.timesteps=1",
            "diffusion.timesteps is 1; it has to be between 2",
        ),
        (AutoencodeConfig, "optim.label_smoothing=0.1", "this task has no labels to smooth"),
    ],
)
def test_ranges(kind, override, message):
    with pytest.raises(UsageError) as error:
        kind().changed(override)
    assert message in str(error.value)

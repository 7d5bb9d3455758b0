"""Configurations from YAML: what is refused, and how it is said."""

from __future__ import annotations

import pytest

from gspn.tasks.classify import TrainConfig, load_config
from gspn.tasks.core.config import read_yaml, write_yaml
from gspn.tasks.core.errors import UsageError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.rl=1", "'optim.rl' is no configuration key; did you mean 'lr'?"),
        ("lr=1", "'lr' is no configuration key; did you mean 'optim.lr'?"),
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
    config = load_config("emoji_nano")
    assert TrainConfig.from_values(read_yaml(write_yaml(config), "it")) == config


def test_yaml_is_read_safely():
    with pytest.raises(UsageError, match="not YAML"):
        read_yaml("!!python/object/apply:os.system ['true']", "the file")


def test_a_file_is_named_in_its_errors(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lrate: 1}")
    with pytest.raises(UsageError, match=r"mine\.yaml: 'optim\.lrate'"):
        load_config(file)
    with pytest.raises(UsageError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="did you mean 'digits_pico'"):
        load_config("digit_pico")

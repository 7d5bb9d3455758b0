"""``gspn classify``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import yaml
from typer.testing import CliRunner

from gspn.cli import app

pytest.importorskip("timm", reason="needs gspn[train]")

TINY = ["--config", "digits_pico", "--model", "test_convnext", "--epochs", "1", "-s", "ema.decay=null",
        "-s", "run.trackers=[]", "-s", "run.device=cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def run():
    patch = pytest.MonkeyPatch()
    patch.setenv("COLUMNS", "200")
    torch.set_num_threads(1)
    yield lambda *arguments: CliRunner().invoke(app, ["classify", *map(str, arguments)])
    patch.undo()


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("cli") / "run"
    result = run("train", *TINY, "--output", output, "--seed", 3, "--set", "optim.lr=4e-3")
    assert result.exit_code == 0, result.output
    assert "best top-1" in result.output
    return output


def test_train_writes_its_configuration(trained):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert (config["run"]["seed"], config["optim"]["lr"], config["schedule"]["epochs"]) == (3, 4e-3, 1)
    assert config["resolved"]["num_classes"] == 10


def test_resume_needs_no_configuration(run, trained):
    result = run("train", "--resume", "--output", trained)
    assert result.exit_code == 0, result.output
    assert "resumed after epoch 1" in result.output


def test_evaluate(run, trained, tmp_path):
    pytest.importorskip("matplotlib")
    result = run("evaluate", trained, "--data", "digits", "--device", "cpu", "--output", tmp_path / "out",
                 "--confusion", tmp_path / "c.png")  # fmt: skip
    assert result.exit_code == 0, result.output
    for word in ("top-1", "top-5", "weakest classes", "images/s", "MiB"):
        assert word in result.output
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["images"] == 364
    assert (tmp_path / "c.png").stat().st_size > 1000
    assert run("evaluate", trained, "--data", "digits", "--confusion", tmp_path / "c.txt").exit_code == 2


def test_predict(run, trained, tmp_path):
    from gspn.data import open_dataset

    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    open_dataset("digits", "val")[0][0].save(good)
    bad.write_bytes(b"no image")
    result = run("predict", good, "--model", trained, "--top", 2)
    assert result.exit_code == 0, result.output
    assert "good.png" in result.output
    assert result.output.count("%") == 2
    result = run("predict", bad, good, "--model", trained, "--json")
    assert result.exit_code == 1
    assert "bad.png" in result.stderr
    predictions = json.loads(result.stdout)
    assert [one["broken"] is None for one in predictions] == [False, True]
    assert sum(predictions[1]["probabilities"]) <= 1


def test_presets(run):
    listed = run("presets")
    assert listed.exit_code == 0
    assert "mnist5k_pico" in listed.output
    assert yaml.safe_load(run("preset", "emoji_nano").output)["data"]["name"] == "emoji"


def test_dry_run_shows_the_configuration_and_trains_nothing(run, tmp_path):
    result = run("train", *TINY, "--output", tmp_path / "x", "--batch-size", 7, "--dry-run")
    assert yaml.safe_load(result.output)["data"]["batch_size"] == 7
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "--config", "digit_pico"], 2, "did you mean 'digits_pico'"),
        (["train", "--set", "optim.rl=1"], 2, "did you mean 'lr'"),
        (["train", *TINY, "--model", "gspn_picoo", "--output", "none"], 2, "did you mean 'gspn_pico'"),
        (["evaluate", "none", "--data", "digits"], 2, "unknown model 'none'"),
        (["predict", "x.png", "--model", "coatnet_0_224"], 2, "no pretrained weights"),
        (["preset", "digit"], 2, "did you mean"),
    ],
)
def test_errors_are_one_line(run, arguments, code, message):
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_the_command_imports_nothing_heavy_and_says_what_is_missing():
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("timm", "accelerate", "torchvision", "yaml", "matplotlib", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import gspn.cli
from gspn.tasks.classify import TrainConfig
sys.argv = ["gspn", "classify", "evaluate", "somewhere", "--data", "digits"]
gspn.cli.app()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'gspn[train]'" in done.stderr
    assert "Traceback" not in done.stderr

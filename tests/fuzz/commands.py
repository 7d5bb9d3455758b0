"""Damaged command lines and files through the ``gspn`` command: its own lines on the terminal, and no traceback."""

from __future__ import annotations

import contextlib
import functools
import re
from random import Random
from typing import Any

from typer.testing import CliRunner

from gspn.cli import app

from .files import CONFIGURATIONS, SPECIAL, classifier, png, written
from .mutate import damaged_file, damaged_value
from .runner import Input, Target

_GROUPS = {
    "TrainConfig": ("classify", "train"),
    "ClassConditionalConfig": ("class-conditional", "train"),
    "AutoencodeConfig": ("autoencode", "train"),
    "DistillConfig": ("t2i", "distill"),
    "TextToImageConfig": ("t2i", "train"),
    "DenseConfig": ("dense", "train"),
    "VitDistillConfig": ("distill",),
}
_SET = (
    "optim.lr=1e-3", "data.size=32", "data.batch_size=8", "schedule.epochs=2", "ema.decay=null", "run.trackers=[]",
    "data.name=digits", "optim.betas=[0.9, 0.99]", "model.name=gspn_pico", "run.seed=1", "augment.scale=[0.5, 1]",
)  # fmt: skip
_WORDS = (
    "", " ", "²", "-1", "0", "1e400", "nan", "100000000000", "é\x1b[31m", "a/../../b", "/etc/passwd", "\udcff", "=",
    "a=b", "optim.lr=", "optim.lr=[", "=1", "optim..lr=1", "optim.lr.x=1", "data=null", "data=[1]", "torch/foo", "--",
    "optim.lr=!!python/object/apply:os.system [id]", "optim.lr=" + "[" * 3000, "run.output=/dev/null", "{a: *b}",
    "x" * 5000,
)  # fmt: skip


@functools.cache
def _sound() -> dict[str, Any]:
    return {
        **{f"model/{name}": data for name, data in classifier().items()},
        "images/0.png": png(),
        "images/1.png": png(),
    }


def make(rng: Random) -> Input:
    """A command line, with damage to a word of it or to a file that it names."""
    if rng.random() < 0.25:
        files, options = dict(_sound()), ["--model", "model", "--top", "2", "images"]
        argv = ["classify", "predict", *(["--json"] if rng.random() < 0.5 else [])]
    else:
        name = rng.choice(list(CONFIGURATIONS))
        kind = CONFIGURATIONS[name]
        files = {"config.yaml": kind.preset_text(rng.choice(kind.preset_names())).encode()}
        options = ["--config", rng.choice(("config.yaml", *kind.preset_names()))]
        for setting in rng.sample(_SET, rng.randint(0, 2)):
            options += ["--set", setting]
        # First, so that no damaged option takes it for its value.
        argv = [*_GROUPS[name], "--dry-run"]
    if rng.random() < 0.5:
        at = rng.randrange(len(options))
        name, equals, _ = options[at].partition("=")
        own = f"{name}={damaged_value(rng, [1])[0]}" if equals else options[at] + rng.choice(("", "x", "/", "\n"))
        options[at] = own if rng.random() < 0.4 else rng.choice(_WORDS)
        options[at] = options[at].replace("\0", "")  # no system passes it on
    else:
        chosen = rng.choice(list(files))
        special = rng.random() < 0.1
        files[chosen] = {"special": rng.choice(SPECIAL)} if special else damaged_file(rng, chosen, files[chosen])
    return {"argv": [*argv, *options], "files": files}


def check(made: Input) -> None:
    """An exit code, and no traceback or sequence that a terminal would obey."""
    with written(made["files"]) as folder, contextlib.chdir(folder):
        result = CliRunner().invoke(app, made["argv"], catch_exceptions=False)
    assert result.exit_code in (0, 1, 2), result.exit_code
    assert not re.search(r"Traceback|[\x00-\x08\x0b-\x1f\x7f-\x9f]", result.output), result.output


TARGET = Target("commands", make, check, 25)

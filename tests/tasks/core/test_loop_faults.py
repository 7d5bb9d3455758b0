"""A training run on a bad day: losses that are not finite, full disks, removed files, a second process."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("timm", reason="needs gspn[train]")
pytest.importorskip("accelerate", reason="needs gspn[train]")

from gspn._errors import UsageError
from gspn._locks import DirectoryLock
from gspn.tasks.core import loop
from gspn.tasks.core.loop import fit
from tasks.core.test_checkpoints import Bomb
from tasks.core.toy import Points, Toy, toy
from tasks.runs import as_version_0_1_0, assert_same, newest_checkpoint, newest_state, rows, stopped_before


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.set_num_threads(1)
    return fit(toy(tmp_path_factory.mktemp("whole")))


class Poisoned(Toy):
    """Loss or gradient of one update (counted from 1) is not finite, at a rate of 0.01."""

    def __init__(self, config, update, what):
        super().__init__(config)
        self.left, self.what = update, what

    def loss(self, model, images, targets, epoch):
        loss = super().loss(model, images, targets, epoch)
        self.left -= 1
        if self.left or self.config.optim.lr < 0.01:
            return loss
        if self.what == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss


def assert_finite(output) -> None:
    files = list(output.rglob("*.safetensors"))
    assert all(value.isfinite().all() for file in files for value in load_file(file).values())


@pytest.mark.parametrize(
    ("update", "what", "every"),  # every: seconds between checkpoints
    [(1, "loss", 0.0), (1, "gradient", 60.0), (8, "gradient", 0.0), (8, "loss", 60.0), (12, "gradient", 60.0)],
)
def test_nothing_is_written_that_is_not_finite(tmp_path, update, what, every):
    settings = [f"run.checkpoint_every_s={every}", "run.log_every=50"]
    with pytest.raises(UsageError, match=r"in epoch \d\. All checkpoints are finite.*--resume.*optim\.lr=0\.005"):
        fit(Poisoned(toy(tmp_path, *settings).config, update, what))
    assert_finite(tmp_path)
    # What the message names is accepted, and said.
    said = io.StringIO()
    task = Poisoned(toy(tmp_path, *settings, "optim.lr=0.005").config, update, what)
    result = fit(task, resume=True, console=Console(file=said, width=200))
    assert result.last.epoch == 3 and "lr: 0.005" in (tmp_path / "config.yaml").read_text()
    if update > 6:
        assert "optim.lr is 0.005 from here on, and was 0.01" in said.getvalue()
    assert_finite(tmp_path)


def test_a_constant_rate_is_changed_too(tmp_path):
    with stopped_before(8):
        fit(toy(tmp_path, "schedule.name=step", "schedule.warmup_epochs=0"))
    changed = ["optim.lr=0.005", "optim.clip_grad=0.5"]
    result = fit(toy(tmp_path, "schedule.name=step", "schedule.warmup_epochs=0", *changed), resume=True)
    assert result.last.lr == pytest.approx(0.005)


@pytest.mark.parametrize("limit", [64, 1000, 2500])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(whole, tmp_path, limit):
    """A limit on the size of a file, which stops another file each time."""
    with stopped_before(8):
        fit(toy(tmp_path / "run"))
    before, kept = newest_state(tmp_path / "run"), resource.getrlimit(resource.RLIMIT_FSIZE)
    task = toy(tmp_path / "run")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, kept[1]))
        with pytest.raises(OSError, match="File too large") as refused:
            fit(task, resume=True, console=Console(file=io.StringIO()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert str(tmp_path / "run") in refused.value.filename and ".part" not in refused.value.filename
    assert not list((tmp_path / "run").rglob(".part-*")) and not (tmp_path / "run" / ".lock").exists()
    assert_same(newest_state(tmp_path / "run"), before)
    fit(toy(tmp_path / "run"), resume=True)
    assert_same(newest_state(tmp_path / "run"), newest_state(whole.output))


def test_no_file_of_a_run_is_a_program(tmp_path):
    """Each file in turn is a pickle that would make a directory, and text of other kinds: one line, or read past."""
    with stopped_before(8):
        fit(toy(tmp_path / "run", "ema.decay=0.9"))
    mark = tmp_path / "mark"
    names = [path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(names) == 12
    whole = shutil.copytree(tmp_path / "run", tmp_path / "kept")
    for name in sorted(names):
        for content in (
            pickle.dumps(Bomb(mark)), b"", b"[" * 10_000, b"\xff\xfe\0a", b'{"a": 1}',
        ):  # fmt: skip
            shutil.rmtree(tmp_path / "run")
            shutil.copytree(whole, tmp_path / "run")
            (tmp_path / "run" / name).write_bytes(content)
            with stopped_before(1, strict=False):
                try:
                    fit(toy(tmp_path / "run"), resume=True, console=Console(file=io.StringIO()))
                except UsageError as error:
                    assert "\n" not in str(error)  # noqa: PT017
            assert not mark.exists(), name


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A run that was stopped after 7 of 18 updates."""
    output = tmp_path_factory.mktemp("cut") / "run"
    with stopped_before(8):
        fit(toy(output), console=Console(file=io.StringIO()))
    return output


def refused(output) -> str:
    """The line with which a resumed run is refused before its first update."""
    with stopped_before(1, strict=False), pytest.raises(UsageError) as error:
        fit(toy(output), resume=True, console=Console(file=io.StringIO()))
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(
    "table",
    ["", "\0", "epoch,step\n1,6\n", "HEAD\n1,6\n", 'HEAD\n"1,6\n', "HEAD,more\n1,6,1,1,1,1,1,1,1,1,1\n"]
    + [f"HEAD\n{cells},1,1,1,1,1,1,," for cells in ("1,", ",6", "x,6", "nan,6", "1,1e400", f"1,{'9' * 5000}", "1,²")]
    + ["HEAD\n1,6,1,1,1,1,1,1,1,1,7,8\n"],
)  # fmt: skip
def test_a_damaged_table_is_refused_before_training(cut, tmp_path, table):
    output = shutil.copytree(cut, tmp_path / "run")
    head = (output / "metrics.csv").read_text().partition("\n")[0]
    (output / "metrics.csv").write_text(table.replace("HEAD", head))
    assert "metrics.csv' is damaged" in refused(output)


@pytest.mark.parametrize("content", [None, "", "null", '"\\e[31m": 3'])
def test_a_checkpoint_without_its_configuration_is_refused(cut, tmp_path, content):
    output = shutil.copytree(cut, tmp_path / "run")
    (output / "config.yaml").unlink() if content is None else (output / "config.yaml").write_text(content)
    refused(output)


@pytest.mark.parametrize(
    "change",
    [{"update": -3}, {"update": 99}, {"update": 2.5}, {"epoch": -1}, {"epoch": 99}, {"epoch": 10**30}, {"broken": -1},
     {"loss_sum": float("nan")}, {"seconds": -1.0}, {"best_epoch": -2}, {"best_score": "a"}, {"x": 1}],
)  # fmt: skip
def test_a_position_that_no_run_has_is_refused(cut, tmp_path, change):
    output = shutil.copytree(cut, tmp_path / "run")
    as_version_0_1_0(newest_checkpoint(output))  # which has no checksums
    path = newest_checkpoint(output) / "state.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "state": values["state"] | change}))
    assert "the state in" in refused(output)


@pytest.mark.parametrize("name", [b"caf\xe9", b"\x1b[31m[bold]%s {x}\n"])
def test_an_output_of_any_name(whole, tmp_path, name):
    output, said = tmp_path / os.fsdecode(name), io.StringIO()
    with stopped_before(8):
        fit(toy(output), console=Console(file=said, width=200))
    fit(toy(output), resume=True, console=Console(file=said, width=200))
    assert "\x1b" not in said.getvalue() and said.getvalue().encode()
    assert rows(output) == rows(whole.output)


def test_a_gradient_that_a_scaler_skips_is_no_failure(tmp_path, monkeypatch):
    """As fp16 on a GPU: too large a scale makes gradients infinite, and the update is left out."""
    plain = loop.make_accelerator

    def make_accelerator(**options):
        accelerator = plain(**options)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        return accelerator

    monkeypatch.setattr(loop, "make_accelerator", make_accelerator)
    scale = ["run.checkpoint_every_s=0"]
    assert fit(Scaled(toy(tmp_path / "whole", *scale).config)).last.epoch == 3
    assert_finite(tmp_path)
    with stopped_before(8):
        fit(Scaled(toy(tmp_path / "run", *scale).config))
    fit(Scaled(toy(tmp_path / "run", *scale).config), resume=True)
    assert_same(newest_state(tmp_path / "run"), newest_state(tmp_path / "whole"))
    scaler = json.loads((newest_checkpoint(tmp_path / "run") / "state.json").read_text())["scaler"]
    assert scaler["scale"] < 2.0**127


class Scaled(Toy):
    def loss(self, model, images, targets, epoch):
        return 32 * super().loss(model, images, targets, epoch)


class Removing(Toy):
    """Its output is removed before the evaluation after an epoch."""

    def evaluate(self, models, context):
        self.epochs = getattr(self, "epochs", 0) + 1
        if self.epochs == self.removed_after:
            shutil.rmtree(self.config.run.output)
        return super().evaluate(models, context)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_an_output_that_is_removed_is_written_again(whole, tmp_path, capsys, epoch):
    task = Removing(toy(tmp_path / "run").config)
    task.removed_after = epoch
    fit(task)
    assert f"{tmp_path / 'run'} was removed while this run writes to it" in capsys.readouterr().err
    names = [sorted(path.name for path in output.iterdir()) for output in (whole.output, tmp_path / "run")]
    assert names[0] == names[1]
    assert rows(tmp_path / "run") == rows(whole.output)
    assert_same(newest_state(tmp_path / "run"), newest_state(whole.output))
    assert fit(toy(tmp_path / "run"), resume=True).last.epoch == 3


def test_a_second_process_is_refused(tmp_path):
    for resume in (False, True):
        with DirectoryLock(tmp_path), pytest.raises(UsageError, match=f"is being written by process {os.getpid()} on"):
            fit(toy(tmp_path), resume=resume)
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoints_are_said_and_the_one_before_is_taken(whole, tmp_path, capsys):
    with stopped_before(8):
        fit(toy(tmp_path / "run"))
    newest = newest_checkpoint(tmp_path / "run")
    (newest / "model.safetensors").write_bytes(bytes((newest / "model.safetensors").stat().st_size))
    said = io.StringIO()
    fit(toy(tmp_path / "run"), resume=True, console=Console(file=said, width=200))
    assert (
        f"checkpoint {newest.name} is damaged" in capsys.readouterr().err and "resumed after epoch 1" in said.getvalue()
    )
    assert_same(newest_state(tmp_path / "run"), newest_state(whole.output))
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        (path / "state.json").write_text("{}")
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(UsageError, match=r"no checkpoint in .* is whole"):
        fit(toy(tmp_path / "run"), resume=True)
    with pytest.raises(UsageError, match="holds a run already"):
        fit(toy(tmp_path / "run"))
    assert before == sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())


class Identified(Toy):
    """The facts that follow from its data are part of the run."""

    def setup(self, context):
        made = super().setup(context)
        made.resolved.update(self.identity)
        return made


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({}, {"classes": ["cat", "dog"], "data": {"files": "abc"}}, None),  # an older version did not save them
        ({"classes": ["cat", "dog"]}, {"classes": ["cat", "fox"]}, r"resolved\.classes\[1\] is 'fox', .* has 'dog'"),
        ({"classes": ["cat"]}, {"classes": ["cat", "fox"]}, r"resolved\.classes is \['cat', 'fox'\], .* has \['cat'\]"),
        ({"data": {"files": "abc"}}, {"data": {"files": "abd"}}, r"resolved\.data\.files is 'abd'"),
        ({"data": {"files": "abc"}}, {"data": {"files": "abc", "sizes": "1"}}, None),
        ({"names": ["a" * 500]}, {"names": ["b" * 500]}, r"resolved\.names\[0\] is 'b{56}\.\.\., .* has 'a{56}\.\.\.;"),
    ],
)
def test_another_data_set_does_not_resume(tmp_path, old, new, message):
    task = Identified(toy(tmp_path).config)
    task.identity = old
    with stopped_before(8):
        fit(task)
    task = Identified(toy(tmp_path).config)
    task.identity = new
    if message is None:
        assert fit(task, resume=True).last.epoch == 3
    else:
        with pytest.raises(UsageError, match=message):
            fit(task, resume=True)


class Killed(Points):
    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Vanishing(Points):
    def __getitem__(self, index):
        raise FileNotFoundError(2, "No such file or directory", f"point {index}")


@pytest.mark.parametrize(
    ("points", "settings", "message"),
    [
        (Killed(50), ["data.workers=1"], "a process that loads images was killed; .*--resume"),
        (Vanishing(50), [], "all 50 images are corrupt.*No such file.*--resume"),
        (Vanishing(50), ["data.workers=1"], "all 50 images are corrupt.*No such file.*--resume"),
    ],
)
def test_loading_that_fails_is_one_line(tmp_path, points, settings, message):
    task = toy(tmp_path, *settings)
    task.points = points
    with pytest.raises(UsageError, match=message) as refused:
        fit(task)
    assert "\n" not in str(refused.value)


class Normalizing(Toy):
    def setup(self, context):
        made = super().setup(context)
        made.model.insert(2, nn.BatchNorm1d(16))
        return made


def test_batchnorm_of_one_image(tmp_path):
    few = ["schedule.epochs=1", "run.checkpoint_every_s=60"]
    with pytest.raises(UsageError, match=r"BatchNorm needs more than one.*raise data\.batch_size"):
        fit(Normalizing(toy(tmp_path, "data.batch_size=1", *few).config))
    assert fit(Normalizing(toy(tmp_path / "two", "data.batch_size=2", *few).config)).last.epoch == 1

"""The training loop: one result whatever interrupts it, however it is split, and refusals of what does not fit."""

from __future__ import annotations

import io
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("timm", reason="needs gspn[train]")
pytest.importorskip("accelerate", reason="needs gspn[train]")

from gspn._errors import UsageError
from gspn.tasks.core.loop import fit
from tasks.core.toy import resume, toy
from tasks.processes import kill_at_random, start, start_many
from tasks.runs import as_version_0_1_0, assert_same, newest_checkpoint, newest_state, rows, stopped_before


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: 3 epochs of 6 updates."""
    torch.set_num_threads(1)
    task, said = toy(tmp_path_factory.mktemp("whole")), io.StringIO()
    return task, fit(task, console=Console(file=said, width=200)), said.getvalue()


def assert_same_run(output: Path, whole: Path) -> None:
    assert_same(newest_state(output), newest_state(whole))
    assert rows(output) == rows(whole)
    for name in ("best", "last"):
        path = Path(name, "model.safetensors")
        assert (output / path).read_bytes() == (whole / path).read_bytes()


def test_result_and_output(whole):
    task, result, said = whole
    table = rows(result.output, timeless=False)
    assert [(row["epoch"], row["step"]) for row in table] == [("1", "6"), ("2", "12"), ("3", "18")]
    assert float(table[-1]["train_loss"]) < float(table[0]["train_loss"])
    assert result.last.epoch == 3 and result.last.ema_loss == pytest.approx(float(table[-1]["ema_loss"]))
    scores = [10 - float(row["ema_loss"]) for row in table]
    assert result.best_score == pytest.approx(max(scores)) and scores[result.best_epoch - 1] == max(scores)
    assert task.saved == [(i + 1, all(score < scores[i] for score in scores[:i])) for i in range(3)]
    lines = said.splitlines()
    assert lines[0].startswith("toy, 0.00 M parameters, on cpu (1 process, fp32)")
    assert lines[1:3] == ["points", "a note"] and "3 epochs of 6 updates, each of 8 images" in lines[3]
    assert len([line for line in lines if line.startswith("epoch ") and "eval " in line]) == 3
    text = (result.output / "config.yaml").read_text()
    assert "images_per_update: 8" in text and "num_classes: 4" in text and "side: 1" in text


def test_killed_twice_and_resumed_is_the_same_run(whole, tmp_path):
    kill_at_random(start(resume, tmp_path, "schedule.epochs=3"), tmp_path, 12)
    process = start(resume, tmp_path, die_in_checkpoint=2)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list((tmp_path / "checkpoints").glob(".part-*-step-*"))
    fit(toy(tmp_path), resume=True)
    assert_same_run(tmp_path, whole[1].output)
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 2
    assert not list((tmp_path / "checkpoints").glob(".part-*"))


@pytest.mark.parametrize("update", [1, 4, 6, 7, 13, 18])
def test_stopped_and_resumed_is_the_same_run(whole, tmp_path, update):
    first = toy(tmp_path)
    with stopped_before(update):
        fit(first)
    second = toy(tmp_path)
    fit(second, resume=True)
    assert_same_run(tmp_path, whole[1].output)
    # No image is loaded twice in an epoch, and none before the update at which the run resumes.
    assert len(second.points.loaded) == 8 * (18 - (update - 1))


def test_settings_that_are_free_change_nothing(whole, tmp_path):
    settings = ["data.batch_size=4", "optim.accumulate=2", "run.checkpoint_every_s=60", "run.log_every=1"]
    with stopped_before(9):
        fit(toy(tmp_path))
    # Batches are not the same, and so the noise: only that it is accepted.
    result = fit(toy(tmp_path, *settings), resume=True)
    assert result.last.epoch == 3
    loaded = fit(toy(tmp_path / "workers", "data.workers=2"))
    assert_same(newest_state(loaded.output), newest_state(whole[1].output))


def test_a_finished_run_resumes_to_nothing(whole):
    _, first, _ = whole
    before = (first.output / "metrics.csv").read_bytes(), newest_state(first.output)
    again = fit(toy(first.output), resume=True)
    assert (again.best_score, again.best_epoch, again.last) == (first.best_score, first.best_epoch, first.last)
    assert before[0] == (first.output / "metrics.csv").read_bytes()
    assert_same(newest_state(first.output), before[1])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.weight_decay=0.1"], r"optim\.weight_decay is 0\.1.*has 0\.05"),
        (["data.batch_size=4"], r"resolved\.images_per_update is 4.*has 8"),
        (["ema.decay=0.5"], r"ema\.decay is 0\.5"),
        (["run.seed=1"], r"run\.seed is 1"),
    ],
)
def test_another_configuration_does_not_resume(whole, overrides, message):
    with pytest.raises(UsageError, match=message):
        fit(toy(whole[1].output, *overrides), resume=True)


def test_refuses_an_output_that_is_taken(whole, tmp_path):
    with pytest.raises(UsageError, match=r"holds a run already.*--resume"):
        fit(toy(whole[1].output))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        fit(toy(tmp_path / "file"))


def test_a_checkpoint_of_version_0_1_0_is_continued(whole, tmp_path):
    with stopped_before(8):
        fit(toy(tmp_path))
    as_version_0_1_0(newest_checkpoint(tmp_path))
    fit(toy(tmp_path), resume=True)
    assert_same_run(tmp_path, whole[1].output)


def test_without_an_average_and_with_few_evaluations(tmp_path):
    result = fit(toy(tmp_path, "ema.decay=null", "run.eval_every=2"))
    table = rows(tmp_path)
    assert [row["eval_loss"] != "" for row in table] == [False, True, True]
    assert all(row["ema_loss"] == "" for row in table) and result.best_epoch == 0


def test_broken_images_are_counted_and_named_once(tmp_path, capsys):
    result = fit(toy(tmp_path, broken=7))
    assert result.broken == ("point 7",)
    assert {row["broken_images"] for row in rows(tmp_path)} <= {"0", "1"}
    assert capsys.readouterr().err.count("point 7") == 1


def share(output, *overrides):
    fit(toy(output, *overrides))


def test_two_processes_share_an_epoch(whole, tmp_path):
    start_many(2, tmp_path / "printed", share, tmp_path / "two", "data.batch_size=4", "schedule.epochs=1")
    printed = (tmp_path / "printed").read_text()
    assert printed.count("epoch 1/1") == 1 and "2 processes" in printed
    [row] = rows(tmp_path / "two")
    # Each process draws its own noise and dropout: the same data, not the same loss to the last digit.
    assert row["step"] == "6"
    assert float(row["train_loss"]) == pytest.approx(float(rows(whole[1].output)[0]["train_loss"]), rel=0.2)


def test_a_run_stops_by_the_clock_and_goes_on_with_the_next_epoch(tmp_path):
    said = io.StringIO()
    task = toy(tmp_path, "run.stop_after_s=1e-9")
    result = fit(task, console=Console(file=said, width=200))
    assert result.last is not None and (result.last.epoch, result.last.step) == (1, 1)
    assert task.saved == [(1, True)] and "stopped in epoch 1 by run.stop_after_s" in said.getvalue()
    assert fit(toy(tmp_path), resume=True).last.epoch == 3

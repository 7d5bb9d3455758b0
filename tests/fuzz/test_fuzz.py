"""Every target on inputs of fixed seeds, and every case: an input that once had a result that must not be."""

from __future__ import annotations

import ctypes
import os
import signal
import time

import pytest
import torch

if not hasattr(os, "fork"):
    pytest.skip("inputs are checked in a process of their own, which os.fork makes", allow_module_level=True)
pytest.importorskip("timm", reason="needs the extra train of gspn")
pytest.importorskip("diffusers", reason="needs the extra diffusers of gspn")

from fuzz import TARGETS
from fuzz.files import SOUND, written
from fuzz.operators import GuardedMemory
from fuzz.runner import FOLDER, MEMORY, Find, Target, read_case, run

CASES = sorted((FOLDER / "cases").glob("*.json"))

EXTRAS = {"dense-model": ("segmentation_models_pytorch", "dense")}
"""The module that a target needs beside the extras above, and the extra that brings it."""


def need(target: str) -> None:
    """Skip the test where the extra of its target is not installed."""
    if target in EXTRAS:
        module, extra = EXTRAS[target]
        pytest.importorskip(module, reason=f"needs the extra {extra} of gspn")


def refuse(finds: list[Find]) -> None:
    reports = [f"seed {find.seed}, written to {find.save()}:\n{find.problem}" for find in finds]
    assert not finds, "\n".join(reports)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_inputs_of_fixed_seeds(target) -> None:
    need(target.name)
    done, finds = run(target, range(target.quick))
    refuse(finds)
    assert done == target.quick


@pytest.mark.parametrize(
    ("name", "made"),
    [pytest.param(*case, id=path.stem) for path in CASES for case in [read_case(path)]],
)
def test_cases(name, made) -> None:
    need(name)
    refuse(run(TARGETS[name], [0], lambda _: made)[1])


@pytest.mark.parametrize("name", SOUND)
def test_files_without_damage_are_read(name) -> None:
    need(name)
    sound, read, *_ = SOUND[name]
    with written(sound()) as folder:
        read(folder)


def _crash(_: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _touch_beside(at_end: bool) -> None:
    tensor = GuardedMemory().copy(torch.ones(3, 5)[:, :4], at_end=at_end)
    assert tensor.sum() == 12
    ctypes.string_at(tensor.data_ptr() + (14 * 4 if at_end else -1), 1)


def _loop(_: object) -> None:
    end = time.process_time() + 1.2
    while time.process_time() < end:
        pass


@pytest.mark.parametrize(
    ("check", "problem"),
    [
        (lambda _: None, None),
        (lambda _: 1 / 0, "ZeroDivisionError"),
        (lambda _: bytearray(2 * MEMORY), "MemoryError"),
        (_crash, "SIGSEGV"),
        (lambda _: _touch_beside(at_end=True), "SIGSEGV"),
        (lambda _: _touch_beside(at_end=False), "SIGSEGV"),
        (_loop, "processor time"),
    ],
    ids=["nothing", "error", "memory", "crash", "behind", "before", "time"],
)
def test_what_must_not_happen_is_a_find(check, problem, monkeypatch) -> None:
    monkeypatch.setattr("fuzz.runner.SECONDS", 1)
    target = Target("probe", lambda rng: {"number": rng.random()}, lambda made: check(made) if made["bad"] else None, 3)
    done, finds = run(target, range(3), lambda seed: {"bad": seed == 1})
    assert done == 3
    assert [find.seed for find in finds] == ([] if problem is None else [1])
    assert all(problem in find.kind for find in finds)

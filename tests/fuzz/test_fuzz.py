"""Every target on inputs of fixed seeds, and every case: an input that once had a result that must not be."""

from __future__ import annotations

import os

import pytest

if not hasattr(os, "fork"):
    pytest.skip("inputs are checked in a process of their own, which os.fork makes", allow_module_level=True)
pytest.importorskip("timm", reason="needs the extra train of gspn")
pytest.importorskip("diffusers", reason="needs the extra diffusers of gspn")

from fuzz import TARGETS
from fuzz.files import SOUND, written
from fuzz.runner import CASES, Find, read_case, run


def refuse(finds: list[Find]) -> None:
    reports = [f"seed {find.seed}, written to {find.save()}:\n{find.problem}" for find in finds]
    assert not finds, "\n".join(reports)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_inputs_of_fixed_seeds(target) -> None:
    done, finds = run(target, range(target.quick))
    refuse(finds)
    assert done == target.quick


@pytest.mark.parametrize("path", sorted(CASES.glob("*.json")), ids=lambda path: path.stem)
def test_cases(path) -> None:
    name, made = read_case(path)
    refuse(run(TARGETS[name], [0], lambda _: made)[1])


@pytest.mark.parametrize("name", SOUND)
def test_files_without_damage_are_read(name) -> None:
    sound, read, *_ = SOUND[name]
    with written(sound()) as folder:
        read(folder)

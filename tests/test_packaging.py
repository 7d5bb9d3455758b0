"""The installed package: one binary for every Python, and an install that succeeds without a compiler."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from support import ROOT, run_python

needs_build = pytest.mark.skipif(
    importlib.util.find_spec("scikit_build_core") is None, reason="scikit-build-core is not installed; pip install it"
)


def build_wheel(folder: Path, **environment: str) -> Path:
    done = subprocess.run(
        [sys.executable, "-c", f"from scikit_build_core.build import build_wheel; build_wheel({str(folder)!r})"],
        env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@needs_build
def test_without_a_compiler_the_wheel_is_pure_python(tmp_path) -> None:
    wheel = build_wheel(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    run_python(
        f"""
import sys, warnings
sys.path.insert(0, {str(tmp_path / "site")!r})
# An editable install of gspn finds itself before sys.path is asked.
sys.meta_path = [f for f in sys.meta_path if "gspn" not in type(f).__module__ and "Redirecting" not in type(f).__name__]
import torch, gspn
assert gspn.__file__.startswith({str(tmp_path)!r}), gspn.__file__
assert "compiler" in gspn.available_impls(torch.zeros(1), op="line_scan")["cpu"]
x, taps = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3, 3) / 3
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        gspn.line_scan(x, taps, direction="down")
assert [w.category for w in caught] == [RuntimeWarning], caught
assert "compiler" in str(caught[0].message)
""",
        PYTHONPATH="",
    )


def test_the_installed_kernels_link_neither_python_nor_torch() -> None:
    from gspn.ops.cpu.library import load

    path = load()._name
    done = subprocess.run(["ldd", path], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"ldd cannot read {path}")
    for name in ("libpython", "libtorch", "libc10", "libgomp", "libomp", "libstdc++", "libcuda"):
        assert name not in done.stdout


def _pinned(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_least_versions_are_those_that_are_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    # The least versions have an environment with the extras of `all`; of the others' packages one version is tested.
    newest, tested = _pinned("constraints.txt"), _pinned("constraints-minimum.txt")
    tested |= {name: version for name, version in newest.items() if name not in tested}
    for requirement in itertools.chain(*lists):
        name, bound, version = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?(>=|==|)(.*)", requirement).groups()
        if name != "gspn":
            assert bound, f"{requirement} has no least version"
            least, actual = (tuple(int(part) for part in re.findall(r"\d+", one)) for one in (version, tested[name]))
            assert actual[: len(least)] == least, f"{requirement}, and {tested[name]} is tested"

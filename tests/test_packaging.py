"""The installed package: one binary for every Python, and an install that succeeds without a compiler."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageDraw

from support import ROOT, run_python

needs_build = pytest.mark.skipif(
    importlib.util.find_spec("scikit_build_core") is None, reason="scikit-build-core is not installed; pip install it"
)
needs_auditwheel = pytest.mark.skipif(
    sys.platform != "linux" or not all(map(importlib.util.find_spec, ("scikit_build_core", "auditwheel")))
    or shutil.which("cmake") is None,
    reason="a Linux wheel is built by scikit-build-core, auditwheel and cmake",
)  # fmt: skip


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


@pytest.fixture(scope="module")
def linux_wheel(tmp_path_factory) -> Path:
    """The wheel as ``make wheel`` builds it, but with the installed library: to compile it takes minutes."""
    from gspn.ops.cpu.library import load

    folder = tmp_path_factory.mktemp("wheel")
    settings = {"build-dir": str(folder / "build"), "cmake.define.GSPN_LIBRARY": load()._name}
    run_python(
        f"""
import sys
from pathlib import Path
sys.path.insert(0, "scripts")
from build_wheel import build
build("linux", Path({str(folder)!r}), {settings!r})
"""
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


@needs_auditwheel
def test_one_linux_wheel_for_every_python_and_the_glibc_of_2012(linux_wheel) -> None:
    name, version, *tags = linux_wheel.name.removesuffix(".whl").split("-")
    assert (name, version) == ("gspn", importlib.metadata.version("gspn"))
    assert tags[:2] == ["py3", "none"]
    assert f"manylinux_2_17_{os.uname().machine}" in tags[2].split(".")
    with zipfile.ZipFile(linux_wheel) as archive:
        names = set(archive.namelist())
        assert archive.getinfo("gspn/ops/cpu/gspn_cpu.so").file_size > 100_000
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    assert not [name for name in names if ".libs/" in name], "nothing is vendored: OpenMP is PyTorch's"
    missing = {path.relative_to(ROOT / "src").as_posix() for path in tracked("src/gspn")} - names
    assert {Path(name).suffix for name in missing} == {".cpp", ".h"}


@needs_auditwheel
@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip; `make test` has one")
def test_the_wheel_installs_and_classifies_without_a_compiler(linux_wheel, tmp_path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--no-compile",
        linux_wheel,
    ]
    subprocess.run(install, check=True, capture_output=True)
    # What gspn depends on is seen where it is installed already; gspn itself is found in the wheel first.
    (site,) = (environment / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    image = Image.new("L", (28, 28))
    ImageDraw.Draw(image).line((14, 4, 14, 24), fill=255, width=3)
    image.save(tmp_path / "one.png")

    def gspn(*arguments: str) -> str:
        command = [environment / "bin" / "gspn", *arguments]
        nothing = {"PATH": str(tmp_path), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=nothing, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert re.search(r"cpu kernels +compiled, run with \w+", gspn("info"))
    (predicted,) = json.loads(gspn("classify", "predict", "one.png", "--model", "gspn_pico.mnist5k", "--json"))
    assert predicted["classes"][0] == "1", predicted
    find = [python, "-c", "import importlib.util; print(importlib.util.find_spec('gspn').origin)"]
    found = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found).is_relative_to(environment)


def tracked(folder: str) -> Iterator[Path]:
    """The files of a folder that git tracks, or would."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("git lists no files here: this is not a checkout")
    return (ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file())


@needs_build
def test_the_source_distribution_has_all_sources_and_no_results(tmp_path) -> None:
    run_python(f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})")
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        content = {
            member.name.partition("/")[2]: archive.extractfile(member).read() for member in archive if member.isfile()
        }
    # What a wheel is built from, byte for byte; so the wheel that is built from it is the same.
    needed = [*tracked("src"), *(ROOT / name for name in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"))]
    for file in needed:
        assert content[file.relative_to(ROOT).as_posix()] == file.read_bytes(), file
    for name in ("CITATION.cff", "CHANGELOG.md", "docs/install.md", "tests/test_packaging.py", "Makefile"):
        assert name in content
    unwanted = re.compile(r"^(runs|build|dist|\.venv|benchmarks/results)(/|$)|\.(so|pt|pyc)$")
    assert not [name for name in content if unwanted.search(name)]
    assert len(content) > 300
    assert path.stat().st_size < 40_000_000


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_pin_their_actions_and_ask_for_few_rights(path) -> None:
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}, "of the whole workflow; a job may ask for more"
    for name, job in workflow["jobs"].items():
        assert "timeout-minutes" in job or "uses" in job, f"{name} may run for six hours"
        more = set(job.get("permissions", {}).items()) - {("contents", "read")}
        # Trusted publishing, and pages: see the workflows. Nothing may write to the repository.
        assert more <= {("id-token", "write"), ("pages", "write")}, f"{name}: {more}"
        assert not more or "environment" in job, f"{name} has rights that no environment guards"
        for step in [job, *job.get("steps", [])]:
            if action := step.get("uses"):
                assert action.startswith("./") or re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), action
            if action and "actions/checkout@" in action:
                assert step["with"]["persist-credentials"] is False
    for line in text.splitlines():
        if re.search(r"uses: [^.]", line):
            assert re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), (
                f"{line.strip()}: the version stands beside the hash"
            )


def test_the_citation_is_of_this_version_and_its_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    papers = {one["identifiers"][0]["value"] for one in citation["references"]}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(papers) == 2
    assert papers <= {f"arXiv:{number}" for number in re.findall(r"arxiv\.org/abs/([\d.]+)", readme)}


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

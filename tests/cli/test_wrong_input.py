"""Every option of every command with values that nobody should give: one line, and never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from gspn._errors import UsageError
from gspn.cli import app
from gspn.cli.messages import one_line_errors

for package in ("timm", "diffusers", "yaml"):
    pytest.importorskip(package, reason="needs gspn[train,diffusers]")

NASTY = [
    "", " ", "²", "-1", "0", "nan", "-inf", "1e999", str(2**70), "9" * 5000, "0x0", "1x", "\ud800", "a\0b",
    "\x1b[31mred",
    "\udcff", "[red]", "$x^$", "../..", "/proc/x/y.png", "/dev/null/x.png", "torch/foo", "foo:bar", "a\nb", "{}",
    "[[[[",
    "--help me", "%s%n",
]  # fmt: skip

# Arguments with which each command ends before its work begins.
NOTHING = "/nonexistent/nothing"
BASE = {
    ("app",): ["--classifier", NOTHING],
    ("explain",): [NOTHING],
    ("export",): [NOTHING, "--output", f"{NOTHING}.onnx"],
    ("classify", "evaluate"): [NOTHING, "--data", NOTHING],
    ("classify", "predict"): [NOTHING, "--model", NOTHING],
    ("class-conditional", "latents"): ["--vae", NOTHING, "--data", NOTHING, "--output", NOTHING],
    ("class-conditional", "sample"): [NOTHING],
    ("class-conditional", "evaluate"): [NOTHING, "--reference", NOTHING],
    ("t2i", "sample"): ["prompt", "--model", NOTHING],
    ("t2i", "evaluate"): [NOTHING],
    ("dense", "earth"): ["--elevation", NOTHING],  # else it builds where the packages are installed
}


COMMAND = typer.main.get_command(app)


@pytest.fixture(autouse=True)
def command_made_once(monkeypatch):
    monkeypatch.setattr("typer.testing._get_command", lambda _: COMMAND)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def commands(group=COMMAND, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())


def base(path):
    if path[0] == "bench":
        return ["--device", "cuda:99"]
    if path[-1] in ("train", "distill"):
        return ["--dry-run"]
    return BASE.get(path, [])


def options(command):
    return [one.opts[0] for one in command.params if one.opts[0].startswith("-") and not getattr(one, "is_flag", False)]


def refused(result, arguments):
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    assert result.exit_code in (0, 1, 2), arguments
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == (result.exit_code != 0), (arguments, result.stderr)
    assert all(line.startswith(("error: ", "warning: ")) for line in lines), (arguments, result.stderr)
    assert all(letter.isprintable() or letter == "\n" for letter in result.stderr), (arguments, result.stderr)


@pytest.mark.parametrize("path", [path for path, command in COMMANDS.items() if options(command)], ids=" ".join)
def test_every_option(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner, command = CliRunner(), COMMANDS[path]
    for i, option in enumerate(options(command)):
        for value in NASTY[i % 4 :: 4]:  # all of them for one option or another, in a quarter of the time
            arguments = [*path, *base(path), option, value]
            refused(runner.invoke(app, arguments), arguments)
    refused(runner.invoke(app, [*path, *base(path), "--nonsense"]), path)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_argument(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in NASTY[::5]:
        count = sum(not one.opts[0].startswith("-") for one in COMMANDS[path].params)
        arguments = [*path, *[value] * count, *[one for one in base(path) if one != NOTHING or path[-1] == "latents"]]
        if count and path != ("t2i", "sample"):
            refused(CliRunner().invoke(app, arguments), arguments)


def test_sizes(tmp_path):
    for size, message in (
        ("²", "is not a size"),
        ("0x0", "is not a size"),
        ("100000000", "takes"),
        ("-5", "not a size"),
    ):
        result = CliRunner().invoke(app, ["class-conditional", "sample", "x", f"--size={size}", "-o", str(tmp_path)])
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_outputs_are_tried_before_the_work():
    result = CliRunner().invoke(app, ["explain", "missing.png", "--output", "/proc/x/y.png"])
    assert (result.exit_code, "/proc/x/y.png: cannot be written" in result.stderr) == (1, True)


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (UsageError("no"), 2, "no"),
        (FileNotFoundError(2, "No such file", "a\x1b.png"), 1, "a\\x1b.png: No such file."),
        (MemoryError(), 1, "out of memory"), (OSError("a\nb"), 1, "a b."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
    ],
)  # fmt: skip
def test_errors_that_are_no_bugs(capsys, error, code, shown):
    with pytest.raises(typer.Exit) as done, one_line_errors():
        raise error
    assert done.value.exit_code == code
    assert shown in (line := capsys.readouterr().err) and line.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("x"), TypeError("x"), RuntimeError("x"), KeyError("x"), AssertionError()])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)), one_line_errors():
        raise error


def test_names_of_any_bytes(tmp_path):
    from PIL import Image

    name = os.path.join(os.fsencode(tmp_path), b"\xff\x1b[31m[red]:cat:.png")  # noqa: PTH118
    with open(name, "wb") as file:  # noqa: PTH123
        Image.new("RGB", (28, 28)).save(file, "PNG")
    settings = {"COLUMNS": "300", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    settings["PYTHONIOENCODING"] = "ascii:strict"
    command = [sys.executable, "-m", "gspn", "classify", "predict", name, "-m", "gspn_pico.mnist5k"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout and b"\xff" not in done.stdout
    assert rb"\xff\x1b[31m[red]:cat:.png" in done.stdout

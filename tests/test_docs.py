"""The documentation is right: its Python runs, its commands exist, and every command has an example."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from support import ROOT

pytest.importorskip("mkdocs")

_SPEC = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts" / "docs_site.py")
site = importlib.util.module_from_spec(_SPEC)
sys.modules["docs_site"] = site  # dataclasses look their module up
_SPEC.loader.exec_module(site)

PAGES = {str(page): (ROOT / page).read_text(encoding="utf-8") for page in site.pages()}
GUIDES = {name: text for name, text in PAGES.items() if name != "CHANGELOG.md"}
COMMANDS = {one.path: one for one in site.commands()}
QUICK = {"docs/line_scan.md", "docs/propagate.md"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name, text in GUIDES.items()
        if any(block.language == "python" for block in site.blocks(text))
    ],
)
def test_the_python_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first block to the last, as one program in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": name}
    for block in site.blocks(GUIDES[name]):
        if block.language == "python" and block.not_run is None:
            # The lines of a traceback are those of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(ROOT / name), "exec"), namespace)


@pytest.mark.parametrize("name", GUIDES)
def test_what_is_not_run_says_why(name: str) -> None:
    text = re.sub(r"`[^`\n]+`", "", GUIDES[name])  # one that is talked about
    marks = [mark.strip() for mark in re.findall(r"<!--(.*?)-->", text, re.S)]
    reasons = [block.not_run for block in site.blocks(GUIDES[name]) if block.not_run is not None]
    assert marks == [f"not run: {reason}" for reason in reasons], "a comment that marks no block"
    assert all(len(reason.split()) > 2 for reason in reasons)


@pytest.mark.parametrize("name", GUIDES)
def test_commands_are_right(name: str) -> None:
    """Each call names a command and options that it has, with as many words as it takes."""
    for line, words, text in site.command_lines(GUIDES[name]):
        where = f"{name}:{line}: {text}"
        depth = next((n for n in (3, 2) if " ".join(words[:n]) in COMMANDS), None)
        assert depth, f"{where}: not a command"
        one = COMMANDS[" ".join(words[:depth])]
        rest = words[depth : words.index(">") if ">" in words else None]
        values, left, _ = one.command.make_parser(one.context).parse_args(rest)  # raises NoSuchOption
        assert not left, f"{where}: {left}"
        missing = [one_of.opts[0] for one_of in one.command.params if one_of.required and not values.get(one_of.name)]
        assert not missing, f"{where}: needs {missing}"


@pytest.mark.parametrize("name", GUIDES)
def test_commands_are_in_shell_blocks(name: str) -> None:
    """So that they are checked, and coloured where the page is shown."""
    others = [block.code for block in site.blocks(GUIDES[name]) if block.language not in site.SHELL]
    outside = re.sub(r"^```\w*\n.*?^```$", "", GUIDES[name], flags=re.M | re.S)
    assert not re.findall(r"^(?:\$ )?gspn [a-z].*", "".join(others), re.M) + re.findall(r"^    gspn .*", outside, re.M)


def test_every_command_has_an_example() -> None:
    calls = [words for text in GUIDES.values() for _, words, _ in site.command_lines(text)]
    assert not sorted(COMMANDS.keys() - {" ".join(words[:n]) for words in calls for n in (2, 3)})


def test_the_pages_of_commands_have_every_option() -> None:
    pages = "".join(site.command_pages().values())
    for one in COMMANDS.values():
        section = pages.split(f"{{ #{one.anchor} }}", 1)[1].split("\n## ")[0]
        for parameter in one.command.params:
            assert parameter.param_type_name == "argument" or parameter.opts[0] in section, (one.path, parameter.opts)

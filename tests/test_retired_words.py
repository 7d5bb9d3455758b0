"""Words that the project no longer uses do not come back."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from support import ROOT

_SPEC = importlib.util.spec_from_file_location("retired_words", ROOT / "scripts" / "retired_words.py")
retired_words = importlib.util.module_from_spec(_SPEC)
sys.modules["retired_words"] = retired_words  # dataclasses look their module up
_SPEC.loader.exec_module(retired_words)

SRC, TEST, PROSE = Path("src/gspn/a.py"), Path("tests/test_a.py"), Path("docs/a.md")


def test_no_retired_word_is_used() -> None:
    assert not "\n".join(map(str, retired_words.all_findings()))


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        (PROSE, "A Picture of it.", ["Picture"]),
        (PROSE, "one\ntwo recipes", ["recipe"]),
        (SRC, "sampler = make_sampler(SAMPLERS)", ["sampler", "sampler", "SAMPLER"]),
        (SRC, "ladder_state = LadderConfig()", ["ladder", "Ladder"]),
        (SRC, 'alignment = "released"', ['"released"']),
        (PROSE, "the released checkpoints", ["released checkpoints"]),
        (TEST, "feature_network = network.networks", ["feature_network", "network", "networks"]),
        (SRC, "found = given", ["found", "given"]),
        (SRC, '"""What a call takes."""', ['"""What']),
        (SRC, "// What a call takes.", ["// What"]),
        (PROSE, "Likewise, it is made anew and goes on.", ["Likewise", "anew", "goes on"]),
        (PROSE, "the counts are held against its own", ["held against"]),
        (PROSE, "it comes to twice that", ["comes to"]),
        (SRC, 'raise ValueError(f"{x} is no size")', ["is no size"]),
        (PROSE, "with GSPN, and with neither.", ["neither."]),
        (SRC, 'help="Of the scheduler."', ['"Of the scheduler.']),
    ],
)
def test_a_retired_word_is_found(path, source, expected) -> None:
    assert sorted(f.text for f in retired_words.findings(source, path)) == sorted(expected)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (SRC, "image = SampleRequest(batch_sampler=torch.utils.data.Sampler)  # a neural network"),
        (TEST, "@given(found)"),
        (PROSE, "There is no such option, it is no longer read. Neither is wrong. The version was released in May."),
    ],
)
def test_ordinary_words_are_not(path, source) -> None:
    assert not list(retired_words.findings(source, path))


def test_the_command_shows_the_place_and_what_to_say(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["retired_words.py"])
    monkeypatch.setattr(retired_words, "all_findings", lambda: [retired_words.Finding(PROSE, 3, "picture", "image")])
    assert retired_words.main() == 1
    assert capsys.readouterr().out == "docs/a.md:3: 'picture'; say image.\n"
    monkeypatch.setattr(retired_words, "all_findings", list)
    assert retired_words.main() == 0

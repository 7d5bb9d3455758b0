"""The UNet of a text-to-image model beside itself with GSPN and without self-attention, at a tenth of its width."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("diffusers.models", reason="needs gspn[diffusers]")

from gspn.bench import unet
from gspn.bench.unet import ATTENTION, CANDIDATES, FLOOR, GSPN, LOCAL, SHARED, UNetProblem
from gspn.cli import app
from gspn.diffusers import GSPNTokenMixer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def problem() -> UNetProblem:
    return UNetProblem("sd15", width=20)


def mixers(problem: UNetProblem, name: str) -> list[GSPNTokenMixer]:
    return [module for module in problem.unet(name).modules() if isinstance(module, GSPNTokenMixer)]


def test_candidates_are_what_they_are_called(problem):
    attentions = {name: list(unet.self_attention_blocks(problem.unet(name)).values()) for name in CANDIDATES}
    assert {len(blocks) for blocks in attentions.values()} == {16}
    assert [len(mixers(problem, name)) for name in CANDIDATES] == [0, 16, 16, 16, 0]
    assert {mixer.scan.groups == mixer.dim for mixer in mixers(problem, GSPN)} == {True}
    assert {mixer.scan.groups for mixer in mixers(problem, SHARED)} == {1}
    assert {mixer.scan.segment for mixer in mixers(problem, LOCAL)} == {8}
    assert {type(block.attn1) for block in attentions[FLOOR]} == {unet.PassThrough}
    # All share the weights of what they have in common, and differ in what comes out.
    whole = problem.unet(ATTENTION).conv_in.weight
    assert all(problem.unet(name).conv_in.weight is whole for name in CANDIDATES)
    results = [problem.call(name, 64)() for name in CANDIDATES]
    assert {tuple(one.shape) for one in results} == {(1, 4, 8, 8)}
    assert all(not torch.allclose(one, results[0]) for one in results[1:])


def test_architectures_have_the_published_counts():
    for name, millions in (("sd15", 860), ("sdxl", 2567)):
        with torch.device("meta"):
            made = unet.UNet2DConditionModel(**UNetProblem(name).config())
        assert sum(p.numel() for p in made.parameters()) / 1e6 == pytest.approx(millions, rel=0.002)


def test_mixers_are_held_against_the_specification(problem, monkeypatch):
    figures = unet.check_mixers(problem)
    assert list(figures) == [GSPN, SHARED, LOCAL]
    assert all(figure.ok for found in figures.values() for figure in found)
    plain = GSPNTokenMixer.forward

    def wrong(self, hidden_states, **options):
        result = plain(self, hidden_states, **options)
        return result if self.scan.impl == "reference" else result + 1e-3

    monkeypatch.setattr(GSPNTokenMixer, "forward", wrong)
    assert not any(figure.ok for found in unet.check_mixers(problem, [GSPN]).values() for figure in found)


def test_times_and_ratios_to_the_floor(problem):
    results = unet.measure_unets(problem, sizes=[64, 128], repeats=1, min_time=0)
    assert [(r.name, r.height) for r in results] == [(name, size) for size in (64, 128) for name in CANDIDATES]
    ratios = unet.over_floor(results)
    assert ratios[FLOOR, 64] == 1 and len(ratios) == 10
    assert {r.params for r in results if r.name == FLOOR} < {r.params for r in results}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "sd3"}, "not one of sd15, sdxl"),
        ({"width": 7}, "does not divide the channels"),
        ({"width": 320}, "does not divide the channels"),
    ],
)
def test_what_is_no_unet(options, message):
    with pytest.raises(ValueError, match=message):
        UNetProblem(**options).config()


def test_the_command(tmp_path):
    command = ["bench", "unet", "--width", "20", "--size", "64", "--repeats", "1", "--min-time", "0"]
    csv, png = tmp_path / "unet.csv", tmp_path / "unet.png"
    options = ["--backend", "math", "--output", str(csv), "--plot", str(png)]
    result = CliRunner().invoke(app, [*command, *options], env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    assert "no self-attention" in result.output and png.is_file()
    assert csv.read_text().count("\n") == 6 and "math" in csv.read_text()
    result = CliRunner().invoke(app, [*command[:4], "--size", "100"])
    assert result.exit_code == 2 and "multiple of 64" in result.output


def test_sizes_in_one_option(monkeypatch):
    from gspn.bench import unet

    asked = []
    monkeypatch.setattr(unet, "check_mixers", lambda problem: {})

    def measure(problem, *, sizes, **options):
        asked.append(tuple(sizes))
        raise ValueError("enough")

    monkeypatch.setattr(unet, "measure_unets", measure)
    command = ["bench", "unet", "--width", "20"]
    CliRunner().invoke(app, [*command, "--sizes", "512, 128", "--size", "64"])
    CliRunner().invoke(app, command)
    assert asked == [(64, 128, 512), (256, 512, 1024)]
    for wrong in ("512,x", "32", "512,"):
        result = CliRunner().invoke(app, [*command, "--sizes", wrong])
        assert result.exit_code == 2 and "--sizes" in result.output
    assert len(asked) == 2

"""``examples/spread.py`` on a small image."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import gspn

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

SCRIPT = Path(__file__).parents[2] / "examples" / "spread.py"


@pytest.fixture(scope="module")
def spread() -> Any:
    spec = importlib.util.spec_from_file_location("spread", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.REPEATS, module.MIN_TIME = 1, 0.0
    return module


@pytest.fixture
def run(spread, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer()
    app.command()(spread.main)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def image(tmp_path) -> Path:
    """Left half dark, right half light: an edge from top to bottom."""
    path = tmp_path / "image.png"
    pixels = Image.new("RGB", (31, 17), (20, 30, 40))
    pixels.paste((230, 220, 200), (16, 0, 31, 17))
    pixels.save(path)
    return path


def test_draws_a_image_and_a_small_copy(run, image, tmp_path):
    output, copy = tmp_path / "out" / "spread.png", tmp_path / "docs" / "spread.png"
    result = run("--image", image, "--point", "10,8", "--output", output, "--readme", copy)
    assert result.exit_code == 0, result.output
    for direction in gspn.DIRECTIONS:
        assert direction in result.output
    with Image.open(output) as full, Image.open(copy) as small:
        assert abs(full.width - 1800) <= 2
        assert small.width < full.width
        assert small.convert("RGB").getpixel((small.width // 2, 1)) == (255, 255, 255)
    assert copy.stat().st_size <= 400_000


@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
def test_what_spreads_stays_in_the_cone_and_mostly_on_its_side_of_the_edge(spread, image, direction):
    photograph, scale = spread.load_photograph(image)
    assert photograph.shape == (3, 17, 31)
    assert scale == 1
    x = spread.impulse(photograph, (15, 8))  # the last dark column
    h = gspn.line_scan(x, spread.edge_aware_taps(photograph, direction), direction=direction)[0, 0]
    rows, columns = torch.meshgrid(torch.arange(17) - 8, torch.arange(31) - 15, indexing="ij")
    along, across = {
        "down": (rows, columns),
        "up": (-rows, columns),
        "right": (columns, rows),
        "left": (-columns, rows),
    }[direction]
    assert bool((h[across.abs() > along] == 0).all())
    assert float(h[8, 15]) == 1
    if direction in ("down", "up"):
        dark, light = h[:, :16].sum() - 1, h[:, 16:].sum()
        assert float(light) < 1e-6 * float(dark)


def test_the_default_photograph_comes_with_scikit_learn(spread):
    pytest.importorskip("sklearn")
    photograph, _ = spread.load_photograph(None)
    assert photograph.shape == (3, 427, 640)
    assert spread.parse_point(None, photograph, 1.0, True) == spread.CHINA_POINT


def test_large_images_are_scaled_down_and_points_with_them(spread, tmp_path):
    path = tmp_path / "large.png"
    Image.new("L", (2560, 100)).save(path)
    photograph, scale = spread.load_photograph(path)
    assert photograph.shape == (3, 50, 1280)
    assert scale == 0.5
    assert spread.parse_point("2559,99", photograph, scale, False) == (1279, 49)
    assert spread.parse_point(None, photograph, scale, False) == (640, 25)


def test_files_that_are_no_images_are_refused(run, image, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(image.read_bytes()[:60])
    text = tmp_path / "text.png"
    text.write_text("no image")
    for path in (broken, text, tmp_path / "missing.png"):
        result = run("--image", path)
        assert result.exit_code == 2, result.output
        assert "cannot be read as an image" in result.output
        assert path.name in result.output


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [200, 100])
def test_decompression_bombs_are_refused_before_they_are_decoded(run, spread, tmp_path, monkeypatch, side):
    path = tmp_path / "bomb.png"
    Image.new("1", (side, side)).save(path)
    monkeypatch.setattr(spread, "MOST_PIXELS", 9_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)  # PIL's own refusal starts at twice that
    result = run("--image", path)
    assert result.exit_code == 2, result.output
    assert path.name in result.output


@pytest.mark.parametrize("point", ["31,0", "0,17", "-1,3", "middle", "1,2,3"])
def test_points_outside_are_refused(run, image, point):
    result = run("--image", image, f"--point={point}")
    assert result.exit_code == 2, result.output
    assert "--point" in result.output
    assert point in result.output


def test_a_wrong_result_draws_nothing(run, spread, image, tmp_path, monkeypatch):
    right = spread.compare

    def with_an_error(results, plain, exact):
        return right({name: result * 1.01 for name, result in results.items()}, plain, exact)

    monkeypatch.setattr(spread, "compare", with_an_error)
    output = tmp_path / "spread.png"
    result = run("--image", image, "--output", output)
    assert result.exit_code == 1
    assert "differs from the specification" in result.output
    assert not output.exists()

"""The page that ``make demo`` writes: whole in itself, and safe with any text."""

from __future__ import annotations

import base64
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "demo"
PIXEL = b"any bytes: the page does not decode its images"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"demo_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while it is being read.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def html(tmp_path: Path) -> str:
    image = tmp_path / "one.png"
    image.write_bytes(PIXEL)
    page = load("page").Page("A <title>", "lead & more")
    page.tile("97.9 %", "right")
    page.section("Heading <b>", 'text "quoted"')
    page.command("gspn info && ls")
    page.table(["map", "a"], [["16 x 16", "<1 ms"]])
    page.images((image, 'a "caption"'), (image, "another"))
    page.footer("torch & python")
    page.write(tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == 2
    assert all(source == f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}" for source in sources)
    assert "<script" not in html
    assert "url(" not in html


def test_text_is_escaped(html: str) -> None:
    for text in ("A &lt;title&gt;", "lead &amp; more", "Heading &lt;b&gt;", "&lt;1 ms", "&amp;&amp; ls", "torch &amp;"):
        assert text in html
    assert 'alt="a &quot;caption&quot;"' in html


def test_a_learning_curve_and_a_grid_are_drawn(tmp_path: Path) -> None:
    from PIL import Image

    from gspn.tasks.classify import Prediction

    figures = load("figures")
    table = tmp_path / "metrics.csv"
    table.write_text("epoch,train_loss,eval_loss,top1,ema_top1\n1,2.0,1.0,50.0,40.0\n2,1.0,0.5,80.0,85.0\n")
    figures.learning_curve(table, tmp_path / "curve.png")
    images = [Image.new("RGB", (28, 28))] * 3
    guesses = [Prediction("0", ("a", "b"), (0.9, 0.1), (0, 1))] * 3
    figures.prediction_grid(images, guesses, ["a", "b", "a"], tmp_path / "grid.png", columns=2)
    for name in ("curve.png", "grid.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 300

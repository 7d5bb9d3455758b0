"""What is written: whole files or none, columns that tell where a figure is from, an image."""

from __future__ import annotations

import csv
import sys

import pytest
import torch

import gspn
from gspn._figures import require_matplotlib, save_figure
from gspn.bench import environment
from gspn.bench.report import Measurement, plain_number, plot_fractions, write_csv
from gspn.bench.timing import Timing

HERE = environment.Environment("a GPU", 4, "avx2", "0.1.0", "2.15.0", None, "3.11.7", "Linux 6", "abc")


def measurement(impl: str = "cpu", mode: str = "forward", direction: str = "down", ms: float = 2.0) -> Measurement:
    return Measurement(
        op="line_scan",
        impl=impl,
        mode=mode,
        direction=direction,
        dtype="float32",
        shape={"batch": 1, "channels": 2, "height": 3, "width": 4, "groups": 2, "segment": None},
        memory_format="contiguous",
        timing=Timing((ms, ms, 2 * ms), 3_000_000),
        traffic=10_000_000,
        copy="torch copy_",
        copy_gbs=10.0,
        loop_ms=100.0,
    )


def test_a_row_holds_the_ratios(tmp_path):
    path = tmp_path / "new" / "table.csv"
    write_csv(path, [measurement(), measurement(ms=4.0)], HERE, pages="kept")
    first, second = csv.DictReader(path.open())
    assert first["gbs"] == "5.0"
    assert first["fraction_of_copy"] == "0.5"
    assert first["speedup_over_loop"] == "50.0"
    assert second["p50_ms"] == "4.0"
    assert second["p80_ms"] == "6.4"
    assert first["segment"] == ""
    assert first["triton"] == ""
    assert first["pages"] == "kept"
    assert first["peak_memory_mb"] == "3.0"
    assert first["commit"] == "abc"
    assert first["date"].endswith("+00:00")


def test_nothing_to_write_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no measurements"):
        write_csv(tmp_path / "table.csv", [], HERE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (0.02639, "0.0264"), (2.8, "2.80"), (16.04, "16.0"), (999.6, "1,000"), (30511.2, "30,511")],
)
def test_numbers_are_plain(value, text):
    assert plain_number(value) == text


def test_the_plot_has_a_bar_for_each_measurement(tmp_path):
    pytest.importorskip("matplotlib")
    measurements = [
        measurement(impl, mode, direction)
        for mode in ("forward", "backward")
        for direction in gspn.DIRECTIONS
        for impl in ("triton", "reference", "line-per-launch")
        if mode == "forward" or impl != "line-per-launch"
    ]
    figure = plot_fractions(measurements, "title", "subtitle")
    assert [len(panel.patches) for panel in figure.axes] == [12, 8]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["triton", "reference", "line-per-launch"]
    path = tmp_path / "plot.png"
    save_figure(figure, path, dpi=40)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install \"gspn\[plot\]\""):
        require_matplotlib()


def test_the_environment_names_versions_and_hardware():
    here = environment.describe(torch.device("cpu"))
    assert here.torch == torch.__version__
    assert here.gspn == gspn.__version__
    assert here.device
    assert here.threads == torch.get_num_threads()
    assert environment.last_level_cache(torch.device("cpu")) >= 1 << 16
    free = environment.free_memory(torch.device("cpu"))
    assert free is None or free > 0
    assert environment.package_version("no-such-package-of-that-name") is None


def test_a_package_outside_its_checkout_has_no_commit(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(gspn, "__file__", str(tmp_path / "__init__.py"))
    assert environment.git_commit() is None


def test_without_compiled_kernels_there_is_no_instruction_set(monkeypatch):
    from gspn.ops.cpu import library

    def missing() -> str:
        raise OSError("not built")

    monkeypatch.setattr(library, "isa", missing)
    assert environment.cpu_kernels_isa() is None

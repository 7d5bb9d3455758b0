"""Files of results: whole or none, the columns, plots; and the environment that they name."""

from __future__ import annotations

import csv

import pytest
import torch

import gspn
from gspn._figures import save_figure
from gspn.bench import environment
from gspn.bench.line_scan import COLUMNS
from gspn.bench.report import Result, plain_number, plot_fractions, write_csv
from gspn.bench.timing import Timing

HERE = environment.Environment("a GPU", 4, "avx2", "0.1.0", "2.15.0", None, "3.11.7", "Linux 6", "abc")


def result(impl: str = "cpu", mode: str = "forward", direction: str = "down", ms: float = 2.0) -> Result:
    return Result(
        name=impl,
        mode=mode,
        batch=1,
        height=3,
        width=4,
        dtype=torch.float32,
        timing=Timing((ms, ms, 2 * ms)),
        baseline="reference",
        baseline_ms=100.0,
        peak_bytes=3_000_000,
        details={"impl": impl, "direction": direction, "segment": None, "copy_gbs": 10.0, "fraction_of_copy": 1 / 3},
    )


def test_a_row_holds_measurements_details_and_environment(tmp_path):
    path = tmp_path / "new" / "table.csv"
    write_csv(path, [result(), result(ms=4.0)], HERE, COLUMNS)
    first, second = csv.DictReader(path.open())
    assert list(first)[: len(COLUMNS)] == list(COLUMNS)
    assert first["fraction_of_copy"] == "0.33333"
    assert (second["p50_ms"], second["p80_ms"], second["samples"]) == ("4.0", "6.4", "3")
    assert (first["segment"], first["triton"], first["commit"], first["impl"]) == ("", "", "abc", "cpu")
    assert first["peak_memory_mb"] == "3.0"
    assert first["date"].endswith("+00:00")


def test_ratios_and_rates():
    one = result(ms=4.0)
    assert (one.ratio, one.images_per_second) == (25.0, 250.0)
    row = one.row()
    assert (row["speedup_over_baseline"], row["images_per_second"], row["baseline"]) == (25.0, 250.0, "reference")


def test_nothing_to_write_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        write_csv(tmp_path / "table.csv", [], HERE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (0.02639, "0.0264"), (2.8, "2.80"), (16.04, "16.0"), (999.6, "1,000"), (30511.2, "30,511")],
)
def test_numbers_are_plain(value, text):
    assert plain_number(value) == text


def test_the_plot_has_a_bar_for_each_result(tmp_path):
    pytest.importorskip("matplotlib")
    results = [
        result(impl, mode, direction)
        for mode in ("forward", "backward")
        for direction in gspn.DIRECTIONS
        for impl in ("triton", "reference", "line-per-launch")
        if mode == "forward" or impl != "line-per-launch"
    ]
    figure = plot_fractions(results, "title", "subtitle")
    assert [len(panel.patches) for panel in figure.axes] == [12, 8]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["triton", "reference", "line-per-launch"]
    path = tmp_path / "plot.png"
    save_figure(figure, path, dpi=40)
    assert path.read_bytes().startswith(b"\x89PNG")


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

"""The table of a UNet by layers, at 1/20 of its width. Where a time has to be exact, the clock counts operations."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers.models", reason="needs gspn[diffusers]")

from gspn._errors import UsageError
from gspn.bench import unet_layers, unet_table
from gspn.bench.attention import SELF_ATTENTION
from gspn.bench.environment import describe
from gspn.bench.unet import GSPN, LOCAL, NO_MIXER, SHARED, UNetSweep
from gspn.bench.unet_layers import COMMON
from gspn.bench.unet_table import LayerBench, LayerTimes, self_attention, total

CPU = torch.device("cpu")
MILLION = 1e6


def operations(call) -> float:
    """The clock of these tests: a "millisecond" is a million operations of matrix products, attention and scans."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / MILLION


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(unet_table, "Stopwatch", lambda device, **_options: operations)


def made(sweep: UNetSweep, path: Path | None = None, **options) -> LayerBench:
    return LayerBench(sweep=sweep, times=LayerTimes(path, describe(CPU)), repeats=1, **options)


@pytest.mark.parametrize(("arch", "dtype"), [("sd15", torch.bfloat16), ("sdxl", torch.float32)])
def test_fake_tensors_find_the_layers_of_a_real_call(arch, dtype):
    sweep = UNetSweep(arch=arch, width=20, dtype=dtype)
    call, recorder = sweep.call(SELF_ATTENTION, 64), unet_layers._Recorder(sweep.unet(SELF_ATTENTION))
    with recorder:
        call()
    assert unet_layers.unet_layers(sweep, 64) == recorder.layers
    assert {layer.kind for layer in recorder.layers} == {*COMMON, unet_layers.MIXER}


@pytest.mark.parametrize("arch", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("counted")
def test_the_sum_has_every_operation_of_a_whole_call(arch):
    sweep = UNetSweep(arch=arch, width=20)
    rows = made(sweep).run([64])
    for name, whole in (
        (self_attention("flash"), SELF_ATTENTION), (self_attention("math"), SELF_ATTENTION), (GSPN, GSPN),
        (SHARED, SHARED), (LOCAL, LOCAL), (NO_MIXER, NO_MIXER),
    ):  # fmt: skip
        added = total(rows, name, 64)
        assert added.ms == pytest.approx(operations(sweep.call(whole, 64)), rel=1e-3)
        assert not added.fitted
        if name in (self_attention("flash"), GSPN, NO_MIXER):  # whole calls, with shared modules
            assert added.error == pytest.approx(0, abs=1e-3)


@pytest.mark.usefixtures("counted")
def test_strips_stand_for_whole_layers(monkeypatch):
    sweep = UNetSweep(width=20)
    whole = {row.key: row.ms for row in made(sweep, slowest_ms=0).run([256])}
    monkeypatch.setattr(unet_table, "_STRIP_MS", 0.0)
    monkeypatch.setattr(unet_table, "_STRIP_ELEMENTS", (1, 1 << 24))
    monkeypatch.setattr(unet_layers, "_SCANNED", 8)
    rows = made(sweep, slowest_ms=0).run([256])
    strips = [row for row in rows if row.strip < 1]
    assert len(strips) > 60 and {row.kind for row in strips} == {*COMMON, SELF_ATTENTION, GSPN, SHARED, LOCAL}
    for row in strips:
        if row.kind == unet_layers.CROSS_ATTENTION:  # the keys and values of 77 words do not shrink with the strip
            assert row.ms > whole[row.key]
        else:
            assert row.ms == pytest.approx(whole[row.key], rel=1e-3)


@pytest.mark.usefixtures("counted")
def test_attention_beyond_the_limit_is_fitted():
    sweep = UNetSweep(width=20)
    exact = {row.key: row for row in made(sweep).run([128, 256])}
    limit = max(row.ms for row in exact.values() if row.kind == self_attention("flash") and row.size == 128)
    rows = made(sweep, slowest_ms=limit).run([128, 256])
    fitted = [row for row in rows if row.samples == 0]
    assert fitted and {row.size for row in fitted} == {256}
    for row in fitted:  # operations are of the power 2
        assert (row.exponent, row.exponent_error) == (pytest.approx(2, abs=1e-3), pytest.approx(0, abs=1e-3))
        assert row.ms == pytest.approx(exact[row.key].ms, rel=1e-3)
    assert total(rows, self_attention("flash"), 256).fitted and not total(rows, GSPN, 256).fitted
    assert any("flash" in line and "tokens^2.000" in line for line in unet_table.fits(rows))


def test_a_power_and_its_error():
    points = [(1.0, 2.0), (4.0, 33.0), (16.0, 500.0)]
    power, error, at = unet_table.fitted_power(points, 64.0)
    x = torch.tensor([[1.0, float(torch.tensor(n).log())] for n, _ in points], dtype=torch.float64)
    y = torch.tensor([ms for _, ms in points], dtype=torch.float64).log()
    solution = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    variance = (y - x @ solution).square().sum() * torch.linalg.inv(x.T @ x)[1, 1]  # one degree of freedom
    assert power == pytest.approx(solution[1].item())
    assert error == pytest.approx(variance.sqrt().item())
    assert at == pytest.approx((solution[0] + solution[1] * torch.tensor(64.0).log()).exp().item())
    with pytest.raises(ValueError, match="two sizes"):
        unet_table.fitted_power(points[:1], 64.0)


def replaced_cell(row: list[str], at: int, value: str) -> list[str]:
    return [*row[:at], value, *row[at + 1 :]]


def test_a_run_continues_the_last_one(tmp_path, monkeypatch):
    path, sweep, calls = tmp_path / "layers.csv", UNetSweep(width=20), []

    def clock(call) -> float:
        calls.append(call)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return 3000.0  # slow: no repeats

    monkeypatch.setattr(unet_table, "Stopwatch", lambda device, **_options: clock)
    with pytest.raises(KeyboardInterrupt):
        made(sweep, path, slowest_ms=0).run([64])
    before = path.read_text().splitlines()
    assert 5 < len(before) < 30
    rows = made(sweep, path, slowest_ms=0).run([64])
    assert path.read_text().splitlines()[: len(before)] == before
    counted, read = len(calls), unet_table.read_rows(path)
    assert sorted(read, key=str) == sorted(rows, key=str)
    # Everything is there: nothing is timed, and another size takes none of these rows.
    assert sorted(made(sweep, path, slowest_ms=0).run([64]), key=str) == sorted(rows, key=str)
    assert len(calls) == counted

    columns = csv.DictReader(path.open()).fieldnames
    assert columns is not None and {"number", "strip", "threads", "commit"} <= set(columns)
    other = path.read_text().replace(describe(CPU).device, "another processor")
    path.write_text(other)
    with pytest.raises(ValueError, match="another processor"):
        LayerTimes(path, describe(CPU))
    lines = path.read_text().replace("another processor", describe(CPU).device).splitlines()
    ms, strip = (columns.index(name) for name in ("ms", "strip"))
    last = next(csv.reader(lines[-1:]))
    for damaged, says in (
        ([*last, "7"], "more cells than there are columns"), (last[:ms], "fewer or more cells"),
        (replaced_cell(last, ms, "nan"), "nan ms"), (replaced_cell(last, ms, "-1"), "-1.0 ms"),
        (replaced_cell(last, strip, "0"), "for 0.0 of its rows"), (replaced_cell(last, ms, "\udcff"), "cannot be read"),
    ):  # fmt: skip
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            file.write("\n".join(lines[:-1]) + "\n")
            csv.writer(file).writerow(damaged)
        with pytest.raises(UsageError, match=says):
            LayerTimes(path, describe(CPU))
    with pytest.raises(UsageError, match="cannot be read"):
        LayerTimes(tmp_path, describe(CPU))
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="does not have the columns"):
        LayerTimes(path, describe(CPU))
    assert path.read_text() == "a,b\n1,2\n"


def test_the_sum_is_near_a_whole_call():
    """Measured: at a twentieth of the width most of a call is overhead, so the margin is wide."""
    rows = made(UNetSweep(width=10), processor_time=True).run([256])
    added = total(rows, NO_MIXER, 256)
    assert added.whole_ms is not None and added.error is not None
    assert -0.6 < added.error < 0.6
    assert total(rows, self_attention("math"), 256).ms > added.ms

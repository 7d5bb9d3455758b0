"""The estimate of ``gspn t2i sample`` beside the figures of docs/how_large.md: the tables in benchmarks/results."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers.models", reason="needs gspn[diffusers]")

from gspn.bench.attention import SELF_ATTENTION
from gspn.bench.unet import GSPN, UNetSweep
from gspn.bench.unet_layers import OnMap, empty_mixer, empty_unet
from gspn.bench.unet_table import read_rows, self_attention, total
from gspn.diffusers.mounting import self_attention_blocks
from gspn.tasks.text_to_image.sample.estimate import CallCost, call_cost

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TABLE = RESULTS / "unet-layers-sdxl-amd-epyc-zen4-1-thread.csv"


def cost(candidate: str, size: int, dtype: torch.dtype = torch.bfloat16) -> CallCost:
    """The estimate of a call of SDXL's UNet."""
    sweep = UNetSweep(arch="sdxl", dtype=dtype)
    unet = empty_unet(sweep)
    for name, block in self_attention_blocks(unet).items() if candidate == GSPN else ():
        unet.set_submodule(name, OnMap(empty_mixer(GSPN, block.attn1, sweep.segment)))
    return call_cost(unet, lambda call: call(**sweep.inputs(size)), torch.device("cpu"), dtype=dtype)


@pytest.fixture(scope="module")
def costs() -> dict[tuple[str, int], CallCost]:
    return {(name, size): cost(name, size) for name in (SELF_ATTENTION, GSPN) for size in (512, 1024, 2048)}


@pytest.mark.slow
def test_the_estimate_grows_as_the_table_does(costs):
    """The estimate scales a call at 1024 by the operations, as here; the table adds up layers measured at each size."""
    rows = read_rows(TABLE)
    for name, candidate in ((GSPN, GSPN), (SELF_ATTENTION, self_attention("flash"))):
        # Operations are constant (for the text), linear and quadratic in the pixels: three sizes say what they are.
        counted = torch.tensor([[1.0, t, t * t] for t in (1, 4, 16)], dtype=torch.float64)
        flops = torch.tensor([costs[name, size].flops for size in (512, 1024, 2048)], dtype=torch.float64)
        law = torch.linalg.solve(counted, flops)
        for size in (2048, 4096, 8192, 16384):
            times = (size / 512) ** 2
            operations = float(law @ torch.tensor([1.0, times, times**2], dtype=torch.float64))
            expected = total(rows, candidate, 1024).ms * operations / costs[name, 1024].flops
            assert expected == pytest.approx(total(rows, candidate, size).ms, rel=0.25)


@pytest.mark.slow
def test_the_memory_of_the_page_is_that_of_the_estimate(costs):
    with (RESULTS / "sdxl-memory.csv").open(newline="") as file:
        rows = {(row["option"], row["size"], row["dtype"]): float(row["peak_gb"]) for row in csv.DictReader(file)}
    for name in (SELF_ATTENTION, GSPN):
        peak = costs[name, 1024].peak_bytes / 1e9
        assert peak == pytest.approx(rows[name, "1024", "bfloat16"], rel=1e-3)
        for size in (4096, 16384):  # linear in the pixels
            assert rows[name, str(size), "bfloat16"] == pytest.approx(peak * (size / 1024) ** 2, rel=0.01)
    assert rows["tiles", "16384", "bfloat16"] < rows["whole", "16384", "bfloat16"] / 50

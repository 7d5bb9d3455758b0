"""A backbone in PyTorch, in ONNX Runtime and, where it is installed, in OpenVINO: time and memory of one image.

    python benchmarks/compare_onnx.py [MODEL:SIZE...] [--threads 2] [--output CSV]

Each model is exported with dynamic sizes by :func:`gspn.export.to_onnx`, which verifies it; then all take turns. The
memory is the peak of a call beyond the weights, with ONNX Runtime's arena off, which would keep it from call to call.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import onnxruntime
import timm
import torch
import typer
from common import Csv, print_table, write_csv

import gspn.export
import gspn.models
from gspn.bench import environment
from gspn.bench.timing import Candidate, peak_memory, time_interleaved

CPU = torch.device("cpu")


def main(
    problems: Annotated[list[str] | None, typer.Argument(metavar="MODEL:SIZE...")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="The fewest samples of each.")] = 7,
    output: Csv = None,
) -> None:
    """Time each model at each size; a table, and a CSV file."""
    torch.set_num_threads(threads)
    here = environment.describe(CPU)
    rows: list[dict[str, Any]] = []
    files: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        for problem in problems or ["gspn_pico:28", "gspn_tiny:224", "gspn_tiny:512"]:
            name, _, side = problem.partition(":")
            torch.manual_seed(0)
            model, x = timm.create_model(name).eval(), torch.randn(1, 3, int(side), int(side))
            if name not in files:
                files[name] = Path(folder) / f"{name}.onnx"
                gspn.export.to_onnx(model, x, files[name])
            timed, frugal = (
                candidates(model, x, files[name], threads, arena=True),
                candidates(model, x, files[name], threads, arena=False),
            )
            right = timed["PyTorch"]()
            for entry, call in timed.items():
                torch.testing.assert_close(call(), right, rtol=1e-3, atol=1e-4, msg=f"{entry} is wrong at {problem}")
            timings = time_interleaved(
                [Candidate(entry, call) for entry, call in timed.items()], CPU, repeats=repeats, min_time=0.3
            )
            rows += [
                {
                    "model": name, "size": side, "entry": entry, "ms_p50": f"{timings[entry].p50:.4g}",
                    "times_pytorch": f"{timings[entry].p50 / timings['PyTorch'].p50:.3g}",
                    "peak_mib": f"{(peak_memory(call, CPU) or 0) / 2**20:.1f}",
                    "version": version(PACKAGES[entry]), "device": here.device, "threads": threads,
                }
                for entry, call in frugal.items()
            ]  # fmt: skip
    columns = ("model", "size", "entry", "ms_p50", "times_pytorch", "peak_mib", "version")
    print_table("one image, float32", columns, [[row[key] for key in columns] for row in rows])
    write_csv(output, rows)


PACKAGES = {"PyTorch": "torch", "ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}


def candidates(
    model: torch.nn.Module, x: torch.Tensor, file: Path, threads: int, *, arena: bool
) -> dict[str, Callable[[], torch.Tensor]]:
    """A call for each runtime that is installed."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_cpu_mem_arena, options.log_severity_level = threads, arena, 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    images = x.numpy()
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "PyTorch": torch.inference_mode()(lambda: model(x)),
        "ONNX Runtime": lambda: torch.from_numpy(session.run(None, {"x": images})[0]),
    }
    if find_spec("openvino") is not None:
        import openvino

        compiled = openvino.compile_model(
            file, "CPU", {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        )
        calls["OpenVINO"] = lambda: torch.from_numpy(compiled(images)[0])
    for call in calls.values():
        call()
    return calls


if __name__ == "__main__":
    typer.run(main)

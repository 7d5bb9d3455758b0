"""Denoisers side by side: the same digits, preset, parameters within 10 % and steps; and GSPN with the official alignment.

    python benchmarks/compare_denoisers.py run [--jobs 2]
    python benchmarks/compare_denoisers.py table [--output CSV]
    python benchmarks/compare_denoisers.py images PNG [--size 56]
    python benchmarks/compare_denoisers.py speed [--output CSV]

Each run is a ``gspn class-conditional train``, ``sample`` and ``evaluate`` in processes of their own with one thread, so that a
machine with n cores takes n at a time. What ended is not done again and what was cut off goes on where it was.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from runs import Step, directory, read_csv, run_all, settings, spread, write_csv

SEEDS = (0, 1)
PRESET = "mnist5k"
EPOCHS = 8
NUMBER, STEPS = 1000, 25
REFERENCE, CLASSIFIER = "mnist5k:train", "gspn_pico.mnist5k"

_SMALL = {"dim": 96, "num_layers": 6}


@dataclass(frozen=True)
class Entry:
    """A row of the comparison: what it is called, and the network."""

    label: str
    network: str = "gspn"
    options: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS


# Widths that bring every network's parameters within 10 % of GSPN's; adaLN in each block costs 44 % more.
ENTRIES = (
    Entry("GSPN", options={**_SMALL, "scan": {"skip": True}}),
    Entry("DiT", "dit", {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 34}),
    Entry("attention in GSPN's place", "attention", {"dim": 88, "num_layers": 6}),
    Entry("GSPN, merged as released", options={**_SMALL, "scan": {"skip": True, "alignment": "official"}}),
    Entry("GSPN, segments of 2", options={**_SMALL, "scan": {"skip": True, "segment": 2}}),
    Entry("GSPN, adaLN in each block", options={**_SMALL, "scan": {"skip": True}, "ada_norm": True}, seeds=(0,)),
)

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
_Root = Annotated[Path, typer.Option(help="Where the runs are kept.")]


def _chain(entry: Entry, seed: int, root: Path) -> list[Step]:
    run = directory(root, PRESET, entry.label, seed)
    values = {
        "schedule.epochs": EPOCHS,
        "model.name": entry.network,
        "model.options": entry.options,
        "run.seed": seed,
    }
    drawn, measured = run / "drawn", run / "measured"
    return [
        Step(
            ["class-conditional", "train", "--config", PRESET, *settings(values), "--output", str(run)],
            run,
            resumes=True,
        ),
        Step(
            [
                "class-conditional",
                "sample",
                str(run),
                "--output",
                str(drawn),
                "--number",
                str(NUMBER),
                "--seed",
                str(seed),
            ]
            + ["--guidance", "1", "--steps", str(STEPS), "--no-grid", "--device", "cpu"],
            drawn,
        ),
        Step(
            ["class-conditional", "evaluate", str(drawn), "--reference", REFERENCE, "--classifier", CLASSIFIER]
            + ["--features", "lite0", "--device", "cpu", "--cache", str(root / "features")]
            + ["--json", str(measured / "figures.json"), "--neighbours", str(measured / "neighbours.png")],
            measured,
        ),
    ]


@app.command()
def run(
    root: _Root = Path("runs/compare_denoisers"),
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = os.cpu_count() or 1,
) -> None:
    """Train every entry with every seed, draw with it and measure what it draws."""
    # Seeds outermost, entries of all seeds first: cut short, those have as many runs as each other.
    order = [(entry, seed) for seed in SEEDS for entry in ENTRIES if seed in entry.seeds]
    order.sort(key=lambda one: len(one[0].seeds), reverse=True)
    run_all([_chain(entry, seed, root) for entry, seed in order], jobs)


@app.command()
def table(
    root: _Root = Path("runs/compare_denoisers"),
    output: Annotated[Path | None, typer.Option(metavar="CSV", help="One row a run.")] = None,
) -> None:
    """Gather the runs that ended: mean and standard deviation over the seeds, and a CSV with each."""
    shown = Table(title=f"{PRESET}, {EPOCHS} epochs", title_justify="left", title_style="bold")
    headings = (
        "",
        "parameters M",
        "held-out loss",
        "FID",
        "sFID",
        "KID x 1000",
        "IS",
        "precision",
        "recall",
        "class %",
    )
    for heading in headings:
        shown.add_column(heading, justify="right" if heading else "left")
    rows = []
    for entry in ENTRIES:
        own = [_row(entry, seed, root) for seed in entry.seeds]
        own = [row for row in own if row is not None]
        rows += own
        if own:
            shown.add_row(
                entry.label,
                f"{own[0]['parameters'] / 1e6:.2f}",
                spread((row["held_out_loss"] for row in own), 4),
                spread(row["fid"] for row in own),
                spread(row["sfid"] for row in own),
                spread(1000 * row["kid"] for row in own),
                spread(row["inception_score"] for row in own),
                spread((row["precision"] for row in own), 3),
                spread((row["recall"] for row in own), 3),
                spread((100 * row["consistency"] for row in own), 1),
            )
    Console(width=180).print(shown)
    if output is not None and rows:
        write_csv(output, rows)


@app.command()
def images(
    output: Annotated[Path, typer.Argument(metavar="PNG")],
    root: _Root = Path("runs/compare_denoisers"),
    size: Annotated[int, typer.Option(metavar="N", min=1, help="Side of the images; trained at 28.")] = 28,
    columns: Annotated[int, typer.Option(metavar="N", min=1, help="Images of each class.")] = 3,
    guidance: Annotated[float, typer.Option(metavar="SCALE", min=0, help="1: none.")] = 2.0,
) -> None:
    """Draw the same noise and classes with each network of seed 0, side by side; DiT's positions are interpolated."""
    from PIL import Image, ImageDraw

    from gspn.tasks.class_conditional import sample

    sheets = []
    for entry in ENTRIES:
        training = _chain(entry, SEEDS[0], root)[0]
        if not training.done:
            continue
        drawn = training.directory / f"images-{size}"
        found = sample(
            training.directory,
            output=drawn,
            number=10 * columns,
            steps=STEPS,
            guidance=guidance,
            height=size,
            width=size,
        )
        if found.grid is not None:
            sheets.append((entry.label, Image.open(found.grid)))
    if not sheets:
        raise typer.BadParameter(f"{root} has no run that ended; start with the command run.")
    gap, line = 16, 22
    across = 3
    wide, tall = sheets[0][1].width + gap, sheets[0][1].height + line + gap
    whole = Image.new("RGB", (gap + min(across, len(sheets)) * wide, gap + -(-len(sheets) // across) * tall), "white")
    pen = ImageDraw.Draw(whole)
    for i, (label, sheet) in enumerate(sheets):
        x, y = gap + i % across * wide, gap + i // across * tall
        pen.text((x + 4, y), label, fill=(31, 31, 51))
        whole.paste(sheet, (x, y + line))
    output.parent.mkdir(parents=True, exist_ok=True)
    whole.save(output)


@app.command()
def speed(
    sizes: Annotated[list[int] | None, typer.Option("--size", metavar="N", help="Sides; repeatable.")] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Images in a call.")] = 8,
    repeats: Annotated[int, typer.Option(metavar="N", min=1)] = 5,
    output: Annotated[Path | None, typer.Option(metavar="CSV")] = None,
) -> None:
    """Time a training step and a call of each network at growing sizes, with random weights, taking turns."""
    import torch

    from gspn.bench import environment
    from gspn.bench.comparison import attention_backend, peak_memory
    from gspn.bench.timing import Candidate, time_interleaved

    device, rows = torch.device("cpu"), []
    here = environment.describe(device)
    for size in sizes or (28, 56, 112):
        calls = {(entry.label, mode): call for entry in ENTRIES for mode, call in _calls(entry, size, batch).items()}
        timed = time_interleaved(
            [Candidate(f"{label}, {mode}", call) for (label, mode), call in calls.items()],
            device,
            repeats=repeats,
            min_time=0.1,
        )
        for (label, mode), call in calls.items():
            ms, base = timed[f"{label}, {mode}"].p50, timed[f"{ENTRIES[0].label}, {mode}"].p50
            rows.append(
                {
                    "entry": label,
                    "mode": mode,
                    "size": size,
                    "batch": batch,
                    "ms_p50": f"{ms:.5g}",
                    "images_per_second": f"{batch / ms * 1e3:.4g}",
                    "over_gspn": f"{base / ms:.4g}",
                    "peak_mib": f"{(peak_memory(call, device) or 0) / 2**20:.1f}",
                    "attention": attention_backend(call),
                    "device": here.device,
                    "threads": here.threads,
                    "torch": here.torch,
                }
            )
    shown = Table(title=f"batch {batch}, {here.device}, {here.threads} threads", title_justify="left")
    for heading in ("mode", "size", "entry", "images/s", "over GSPN", "peak MiB", "attention"):
        shown.add_column(heading)
    for row in sorted(rows, key=lambda row: (row["mode"], row["size"])):
        keys = ("mode", "size", "entry", "images_per_second", "over_gspn", "peak_mib", "attention")
        shown.add_row(*(str(row[key]) for key in keys))
    Console(width=140).print(shown)
    if output is not None:
        write_csv(output, rows)


def _calls(entry: Entry, size: int, batch: int) -> dict[str, Any]:
    import torch

    from gspn.tasks.class_conditional import GenerateConfig
    from gspn.tasks.class_conditional.model import build_denoiser

    config = GenerateConfig.load(PRESET).changed(**{"model.name": entry.network, "model.options": entry.options})
    network = build_denoiser(config, num_classes=10, channels=1, sample_size=28).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    noisy = torch.randn(batch, 1, size, size)
    t, labels = torch.rand(batch) * 1000, torch.arange(batch) % 10

    def denoise() -> Any:
        with torch.no_grad():
            return network(noisy, timestep=t, class_labels=labels).sample

    def step() -> None:
        (network(noisy, timestep=t, class_labels=labels).sample - noisy).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"denoising call": denoise, "training step": step}


def _row(entry: Entry, seed: int, root: Path) -> dict[str, Any] | None:
    steps = _chain(entry, seed, root)
    if not all(step.done for step in steps):
        return None
    training, _, measured = (step.directory for step in steps)
    epochs = read_csv(training / "metrics.csv")
    found = json.loads((measured / "figures.json").read_text())
    kept = (
        *("features", "sample_count", "reference", "reference_count", "fid", "sfid", "kid", "kid_std"),
        *("inception_score", "inception_score_std", "precision", "recall", "consistency"),
    )
    return {
        "entry": entry.label,
        "network": entry.network,
        "options": json.dumps(entry.options),
        "seed": seed,
        "epochs": len(epochs),
        "updates": int(epochs[-1]["step"]),
        "parameters": _parameters(training),
        "train_loss": float(epochs[-1]["train_loss"]),
        "held_out_loss": float(epochs[-1]["ema_loss"]),
        "train_seconds": round(sum(float(epoch["seconds"]) for epoch in epochs), 1),
        "train_images_per_second": round(statistics.median(float(e["images_per_second"]) for e in epochs), 1),
        **{key: found[key] for key in kept},
    }


def _parameters(training: Path) -> int:
    import yaml

    return yaml.safe_load((training / "config.yaml").read_text())["resolved"]["parameters"]


if __name__ == "__main__":
    app()

"""Denoisers side by side: the same digits, recipe, parameters within 10 % and steps; and GSPN as released.

    python benchmarks/compare_denoisers.py run [--jobs 2]
    python benchmarks/compare_denoisers.py table [--output CSV]

Each run is a ``gspn generate train``, ``sample`` and ``evaluate`` in processes of their own with one thread, so that a
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
RECIPE = "mnist5k"
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


# Widths that bring every network's parameters within 10 % of GSPN's; adaLN in each block costs 44 % more.
ENTRIES = (
    Entry("GSPN", options={**_SMALL, "scan": {"skip": True}}),
    Entry("DiT", "dit", {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 34}),
    Entry("attention in GSPN's place", "attention", {"dim": 88, "num_layers": 6}),
    Entry("GSPN, merged as released", options={**_SMALL, "scan": {"skip": True, "alignment": "released"}}),
    Entry("GSPN, segments of 2", options={**_SMALL, "scan": {"skip": True, "segment": 2}}),
    Entry("GSPN, adaLN in each block", options={**_SMALL, "scan": {"skip": True}, "ada_norm": True}),
)

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
_Root = Annotated[Path, typer.Option(help="Where the runs are kept.")]


def _chain(entry: Entry, seed: int, root: Path) -> list[Step]:
    run = directory(root, RECIPE, entry.label, seed)
    values = {
        "schedule.epochs": EPOCHS,
        "model.network": entry.network,
        "model.options": entry.options,
        "run.seed": seed,
    }
    drawn, measured = run / "drawn", run / "measured"
    return [
        Step(["generate", "train", "--config", RECIPE, *settings(values), "--output", str(run)], run, resumes=True),
        Step(
            ["generate", "sample", str(run), "--output", str(drawn), "--number", str(NUMBER), "--seed", str(seed)]
            + ["--guidance", "1", "--steps", str(STEPS), "--no-grid", "--device", "cpu"],
            drawn,
        ),
        Step(
            ["generate", "evaluate", str(drawn), "--reference", REFERENCE, "--classifier", CLASSIFIER]
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
    # Seeds outermost: cut short, every entry has as many runs as any other.
    run_all([_chain(entry, seed, root) for seed in SEEDS for entry in ENTRIES], jobs)


@app.command()
def table(
    root: _Root = Path("runs/compare_denoisers"),
    output: Annotated[Path | None, typer.Option(metavar="CSV", help="One row a run.")] = None,
) -> None:
    """Gather the runs that ended: mean and standard deviation over the seeds, and a CSV with each."""
    shown = Table(title=f"{RECIPE}, {EPOCHS} epochs", title_justify="left", title_style="bold")
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
        own = [_row(entry, seed, root) for seed in SEEDS]
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

"""Denoisers side by side: the same digits, preset and steps, parameters within 10 %; and GSPN with other options.

    python benchmarks/compare_denoisers.py run [--jobs 2]
    python benchmarks/compare_denoisers.py table [--output CSV]
    python benchmarks/compare_denoisers.py images PNG [--size 56]
    python benchmarks/compare_denoisers.py speed [--output CSV]

Each run is a ``gspn class-conditional train``, ``sample`` and ``evaluate`` in processes of their own with one thread,
so that a machine with n cores takes n runs at a time. A step that ended is not repeated, and a training run that was
stopped continues.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from common import (
    CORES,
    Csv,
    Jobs,
    Root,
    Step,
    directory,
    measure_calls,
    print_table,
    read_csv,
    run_all,
    settings,
    spread,
    write_csv,
)

SEEDS = (0, 1)
PRESET = "mnist5k"
EPOCHS = 8
NUMBER, STEPS = 1000, 25
REFERENCE, CLASSIFIER = "mnist5k:train", "gspn_pico.mnist5k"

_SMALL = {"dim": 96, "num_layers": 6}


@dataclass(frozen=True)
class Entry:
    """A row of the comparison: its label and its model."""

    label: str
    model: str = "gspn"
    options: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS


# Widths that make every model's parameters equal to GSPN's within 10 %; adaLN in each block costs 44 % more.
ENTRIES = (
    Entry("GSPN", options={**_SMALL, "scan": {"skip": True}}),
    Entry("DiT", "dit", {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 34}),
    Entry("attention in GSPN's place", "attention", {"dim": 88, "num_layers": 6}),
    Entry("GSPN, merged as released", options={**_SMALL, "scan": {"skip": True, "alignment": "official"}}),
    Entry("GSPN, segments of 2", options={**_SMALL, "scan": {"skip": True, "segment": 2}}),
    Entry("GSPN, adaLN in each block", options={**_SMALL, "scan": {"skip": True}, "ada_norm": True}, seeds=(0,)),
)

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")
_ROOT = Path("runs/compare_denoisers")


def _chain(entry: Entry, seed: int, root: Path) -> list[Step]:
    run = directory(root, PRESET, entry.label, seed)
    values = {
        "schedule.epochs": EPOCHS,
        "model.name": entry.model,
        "model.options": entry.options,
        "run.seed": seed,
    }
    samples, evaluation = run / "samples", run / "evaluation"
    train = ["train", "--config", PRESET, *settings(values), "--output", run]
    sample = ["sample", run, "--output", samples, "--number", NUMBER, "--seed", seed, "--steps", STEPS]
    sample += ["--guidance", 1, "--no-grid", "--device", "cpu"]
    evaluate = ["evaluate", samples, "--reference", REFERENCE, "--classifier", CLASSIFIER, "--features", "lite0"]
    evaluate += ["--device", "cpu", "--cache", root / "features", "--output", evaluation]
    evaluate += ["--neighbours", evaluation / "neighbours.png"]

    def step(arguments: list[Any], where: Path, resumes: bool = False) -> Step:
        return Step(["class-conditional", *map(str, arguments)], where, resumes)

    return [step(train, run, resumes=True), step(sample, samples), step(evaluate, evaluation)]


@app.command()
def run(root: Root = _ROOT, jobs: Jobs = CORES) -> None:
    """Train every entry with every seed, sample with it, and measure the samples."""
    # Seeds outermost, and first the entries with all seeds: if it is stopped, these have equally many runs.
    order = [(entry, seed) for seed in SEEDS for entry in ENTRIES if seed in entry.seeds]
    order.sort(key=lambda one: len(one[0].seeds), reverse=True)
    run_all([_chain(entry, seed, root) for entry, seed in order], jobs)


@app.command()
def table(root: Root = _ROOT, output: Csv = None) -> None:
    """Gather the runs that ended: mean and standard deviation over the seeds, and a CSV with each run."""
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
    rows, shown = [], []
    for entry in ENTRIES:
        own = [_row(entry, seed, root) for seed in entry.seeds]
        own = [row for row in own if row is not None]
        rows += own
        if own:
            shown.append(
                (
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
            )
    print_table(f"{PRESET}, {EPOCHS} epochs", headings, shown)
    write_csv(output, rows)


@app.command()
def images(
    output: Annotated[Path, typer.Argument(metavar="PNG", help="Image to write.")],
    root: Root = _ROOT,
    size: Annotated[int, typer.Option(metavar="N", min=1, help="Height and width of the images; trained at 28.")] = 28,
    columns: Annotated[int, typer.Option(metavar="N", min=1, help="Number of images of each class.")] = 3,
    guidance: Annotated[float, typer.Option(metavar="SCALE", min=0, help="Guidance scale; 1 disables it.")] = 2.0,
) -> None:
    """Sample from the same noise and classes with each model of seed 0; DiT's positions are interpolated."""
    from PIL import Image, ImageDraw

    from gspn.data import load_image
    from gspn.tasks.class_conditional import sample

    grids = []
    for entry in ENTRIES:
        training = _chain(entry, SEEDS[0], root)[0]
        if training.done:
            samples = sample(
                training.directory, output=training.directory / f"images-{size}", number=10 * columns, steps=STEPS,
                guidance=guidance, height=size, width=size,
            )  # fmt: skip
            if samples.grid is not None:
                grids.append((entry.label, load_image(samples.grid)))
    if not grids:
        raise typer.BadParameter(f"{root} has no run that ended; start with the command run.")
    gap, line, across = 16, 22, 3
    wide, tall = grids[0][1].width + gap, grids[0][1].height + line + gap
    whole = Image.new("RGB", (gap + min(across, len(grids)) * wide, gap + -(-len(grids) // across) * tall), "white")
    pen = ImageDraw.Draw(whole)
    for i, (label, grid) in enumerate(grids):
        x, y = gap + i % across * wide, gap + i // across * tall
        pen.text((x + 4, y), label, fill=(31, 31, 51))
        whole.paste(grid, (x, y + line))
    output.parent.mkdir(parents=True, exist_ok=True)
    whole.save(output)


@app.command()
def speed(
    sizes: Annotated[
        list[int] | None, typer.Option("--size", metavar="N", help="Height and width of the images. Repeatable.")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Images in a call.")] = 8,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Fewest samples of each.")] = 5,
    output: Csv = None,
) -> None:
    """Time a training step and a call of each model at growing sizes, with random weights, in turns."""
    rows = []
    for size in sizes or (28, 56, 112):
        models = {entry.label: _calls(entry, size, batch) for entry in ENTRIES}
        for mode in ("denoising call", "training step"):
            calls = {label: own[mode] for label, own in models.items()}
            columns = {"mode": mode, "size": size, "batch": batch}
            rows += measure_calls(calls, columns, {"over_gspn": ENTRIES[0].label}, repeats)
    for row in rows:
        row["images_per_second"] = f"{batch / float(row['ms_p50']) * 1e3:.4g}"
    keys = ("mode", "size", "entry", "images_per_second", "over_gspn", "peak_mib", "attention")
    rows.sort(key=lambda row: (row["mode"], row["size"]))
    print_table(f"batch {batch}", keys, [[row[key] for key in keys] for row in rows])
    write_csv(output, rows)


def _calls(entry: Entry, size: int, batch: int) -> dict[str, Any]:
    import torch

    from gspn.tasks.class_conditional import ClassConditionalConfig
    from gspn.tasks.class_conditional.model import build_denoiser

    config = ClassConditionalConfig.load(PRESET).changed(**{"model.name": entry.model, "model.options": entry.options})
    model = build_denoiser(config, num_classes=10, channels=1, sample_size=28).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    noisy = torch.randn(batch, 1, size, size)
    t, labels = torch.rand(batch) * 1000, torch.arange(batch) % 10

    def denoise() -> Any:
        with torch.no_grad():
            return model(noisy, timestep=t, class_labels=labels).sample

    def step() -> None:
        (model(noisy, timestep=t, class_labels=labels).sample - noisy).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"denoising call": denoise, "training step": step}


def _row(entry: Entry, seed: int, root: Path) -> dict[str, Any] | None:
    steps = _chain(entry, seed, root)
    if not all(step.done for step in steps):
        return None
    training, _, evaluation = (step.directory for step in steps)
    epochs = read_csv(training / "metrics.csv")
    resolved = yaml.safe_load((training / "config.yaml").read_text())["resolved"]
    figures = json.loads((evaluation / "evaluation.json").read_text())
    kept = (
        *("features", "sample_count", "reference", "reference_count", "fid", "sfid", "kid", "kid_std"),
        *("inception_score", "inception_score_std", "precision", "recall", "consistency"),
    )
    return {
        "entry": entry.label,
        "network": entry.model,
        "options": json.dumps(entry.options),
        "seed": seed,
        "epochs": len(epochs),
        "updates": int(epochs[-1]["step"]),
        "parameters": resolved["parameters"],
        "train_loss": float(epochs[-1]["train_loss"]),
        "held_out_loss": float(epochs[-1]["ema_loss"]),
        "train_seconds": round(sum(float(epoch["seconds"]) for epoch in epochs), 1),
        "train_images_per_second": round(statistics.median(float(e["images_per_second"]) for e in epochs), 1),
        **{key: figures[key] for key in kept},
    }


if __name__ == "__main__":
    app()

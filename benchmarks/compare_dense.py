"""Encoders of one size side by side on maps of the Earth: quality by the size of the training crops and by the width of
the context in tests, speed and memory.

    gspn dense earth --output runs/earth [--elevation earth-topology.png]
    python benchmarks/compare_dense.py run climate land [--crop 128] [--jobs 2]
    python benchmarks/compare_dense.py table climate land -o compare-dense.csv
    python benchmarks/compare_dense.py plot compare-dense.csv compare-dense.png
    python benchmarks/compare_dense.py images runs/earth_climate dense-climates.jpg
    python benchmarks/compare_dense.py speed -o compare-dense-speed.csv

Each run is a ``gspn dense train`` in a process of its own with one thread, and then tests by windows of several widths.
A run that ended is not repeated, and one that was stopped continues.
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

from gspn._files import replaced

SEEDS = (0, 1)
CROPS = (128, 256, 512)
WIDTHS = (128, 256, 512, 1024)
STAGES = "crop / 4, 8, 16, 32"
"""In the place of an argument: the lines of the four stages' maps of a training crop."""
TILES = 391  # training images of the Earth


@dataclass(frozen=True)
class Entry:
    """A row: its label, its encoder and decoder, their arguments, and the tasks that it takes part in."""

    label: str
    model: str
    kwargs: dict[str, Any]
    decoder: str = "FPN"
    decoder_kwargs: dict[str, Any] = field(
        default_factory=lambda: dict(decoder_pyramid_channels=32, decoder_segmentation_channels=32, decoder_dropout=0.0)
    )

    tasks: tuple[str, ...] = ("climate", "land", "elevation")

    def settings(self, crop: int) -> dict[str, Any]:
        """The section `model` of the configuration of a training with crops of that side."""
        stages = [crop // by for by in (4, 8, 16, 32)]
        kwargs = {key: stages if value is STAGES else value for key, value in self.kwargs.items()}
        return {
            "model.name": self.model, "model.kwargs": kwargs, "model.decoder": self.decoder,
            "model.decoder_kwargs": self.decoder_kwargs,
        }  # fmt: skip


_GSPN = dict(dims=[16, 32, 64, 128], depths=[1, 1, 3, 1], groups=1)
# Encoders of 0.5 to 0.7 M parameters with maps at 1/4 to 1/32. A plain vision transformer has one resolution, so its
# decoder is DPT, which makes the same four from it.
ENTRIES = (
    Entry("GSPN, global", "gspn_tiny", {**_GSPN, "segment": None, "reference_lines": STAGES}),
    Entry("GSPN, segments of 2", "gspn_tiny", {**_GSPN, "segment": 2, "reference_lines": STAGES}),
    Entry("ConvNeXt", "convnext_atto", dict(dims=[16, 32, 64, 128], depths=[1, 1, 5, 2])),
    Entry(
        "Swin",
        "swin_tiny_patch4_window7_224",
        dict(embed_dim=16, depths=[1, 1, 4, 1], num_heads=[1, 2, 4, 8], window_size=8,
             strict_img_size=False, always_partition=True),
    ),
    Entry(
        "ViT",
        "vit_tiny_patch16_224",
        dict(embed_dim=60, num_heads=2, class_token=False, global_pool="avg", dynamic_img_size=True),
        "DPT",
        dict(decoder_readout="ignore", decoder_intermediate_channels=[16, 32, 60, 60], decoder_fusion_channels=16),
    ),
    Entry("GSPN, global, no reference lines", "gspn_tiny", {**_GSPN, "segment": None}, tasks=("climate",)),
)  # fmt: skip
TASKS = {
    "climate": {"data.options.target": "climate", "loss.class_weights": "balanced"},
    "land": {"data.options.target": "land", "loss.class_weights": None},
    "elevation": {"data.options.target": "elevation", "loss.class_weights": None},
}
_ROOT = Path("runs/compare_dense")

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")
_Tasks = Annotated[list[str], typer.Argument(metavar="TASK...", help=f"One or more of {', '.join(TASKS)}.")]
_Earth = Annotated[Path, typer.Option(metavar="DIR", help="Directory that gspn dense earth wrote.")]
_Crops = Annotated[list[int], typer.Option("--crop", metavar="N", help="Sides of the training crops. Repeatable.")]
_EARTH = Path("runs/earth")


@dataclass(frozen=True)
class Budget:
    """As many updates, of as many pixels, for all encoders and sizes of crops."""

    updates: int
    pixels: int

    def batch(self, crop: int) -> int:
        """The crops in a batch."""
        if crop**2 > self.pixels:
            raise typer.BadParameter(f"--pixels {self.pixels} is less than one crop of {crop} has, {crop**2}.")
        return self.pixels // crop**2


def _chain(task: str, crop: int, entry: Entry, seed: int, budget: Budget, earth: Path, output: Path) -> list[Step]:
    batch = budget.batch(crop)
    values = {
        **entry.settings(crop),
        **TASKS[task],
        "data.root": str(earth),
        "data.size": crop,
        "data.batch_size": batch,
        "data.eval_split": None,
        "data.mean": [0.485, 0.456, 0.406],  # for all encoders the same
        "data.std": [0.229, 0.224, 0.225],
        "optim.lr": 2e-3,
        "optim.lr_base_batch": None,
        "schedule.epochs": max(1, round(budget.updates * batch / TILES)),
        "schedule.warmup_epochs": 0.3,
        "augment.least_labelled": 0.2 if task != "land" else 0.0,
        "run.seed": seed,
        "run.trackers": [],
    }
    arguments = ["dense", "train", "--config", "earth_climate", *settings(values), "--output", str(output)]
    test = Step(
        ["test", str(output), "--task", task, "--earth", str(earth)], output / "tests", script=str(Path(__file__))
    )
    return [Step(arguments, output, resumes=True), test]


def _where(root: Path, task: str, crop: int, entry: Entry, seed: int) -> Path:
    return directory(root, f"{task}-{crop}", entry.label, seed)


@app.command()
def run(
    tasks: _Tasks,
    crops: _Crops = list(CROPS),  # noqa: B006
    updates: Annotated[int, typer.Option(min=1, help="Updates of a run, rounded to whole epochs.")] = 400,
    pixels: Annotated[int, typer.Option(min=1, help="Pixels of a batch, at least those of one crop.")] = 512 * 512,
    earth: _Earth = _EARTH,
    root: Root = _ROOT,
    jobs: Jobs = CORES,
    entries: Annotated[list[str] | None, typer.Option("--entry", help="Label. Repeatable; default: all.")] = None,
) -> None:
    """Train every entry for the tasks with every seed, and test it."""
    # Seeds outermost: if it is stopped, every entry has as many runs as any other.
    budget = Budget(updates, pixels)
    chains = [
        _chain(task, crop, entry, seed, budget, earth, _where(root, task, crop, entry, seed))
        for seed in SEEDS
        for crop in crops
        for task in tasks
        for entry in ENTRIES
        if task in entry.tasks and (entries is None or entry.label in entries)
    ]
    run_all(chains, jobs)


@app.command(hidden=True)
def test(
    where: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a run.")],
    task: Annotated[str, typer.Option()],
    earth: _Earth,
) -> None:
    """Test a run on the held-out band, by windows of several widths: each pixel sees so much around it, or less."""
    from dataclasses import asdict

    from gspn.tasks.dense import evaluate
    from gspn.tasks.dense.model import load_model

    model = load_model(where / "last")
    results = {}
    for width in WIDTHS:
        batch = max(1, 4 * 128 * 128 // width**2)
        result = evaluate(model, data="earth", root=earth, options={"target": task}, window=width, batch_size=batch,
                          overlap=0.0, device="cpu")  # fmt: skip
        results[width] = {**asdict(result.scores), "megapixels_per_second": result.megapixels_per_second}
    (where / "tests").mkdir(exist_ok=True)
    (where / "tests" / "scores.json").write_text(json.dumps(results))


@app.command()
def table(tasks: _Tasks, crops: _Crops = list(CROPS), root: Root = _ROOT, output: Csv = None) -> None:  # noqa: B006
    """Gather the runs that ended: means over the seeds by the width of the tests' windows, and a CSV with each run."""
    rows: list[dict[str, Any]] = []
    for task in tasks:
        score = "mae" if task == "elevation" else "miou"
        for crop in crops:
            shown = []
            for entry in ENTRIES:
                own = [_row(root, task, crop, entry, seed) for seed in SEEDS]
                own = [row for row in own if row is not None]
                rows += own
                if own:
                    shown.append((
                        entry.label, len(own), own[0]["updates"],
                        *(spread((row[f"{score}_at_{width}"] for row in own), 1) for width in WIDTHS),
                        f"{statistics.median(row['images_per_second'] for row in own):.1f}",
                    ))  # fmt: skip
            if shown:
                headings = ("encoder", "seeds", "updates", *(f"{score} at {width}" for width in WIDTHS), "images/s")
                print_table(f"{task}, crops of {crop}", headings, shown)
    write_csv(output, rows)


def _row(root: Path, task: str, crop: int, entry: Entry, seed: int) -> dict[str, Any] | None:
    where = _where(root, task, crop, entry, seed)
    if not ((where / "done").exists() and (where / "tests" / "done").exists()):
        return None
    epochs = read_csv(where / "metrics.csv")
    scores = json.loads((where / "tests" / "scores.json").read_text())
    names = ("mae", "rmse", "abs_rel", "delta1") if task == "elevation" else ("miou", "accuracy")
    row = {
        "task": task,
        "encoder": entry.label,
        "crop": crop,
        "seed": seed,
        "updates": int(epochs[-1]["step"]),
        "batch": yaml.safe_load((where / "config.yaml").read_text())["data"]["batch_size"],
        "train_loss": float(epochs[-1]["train_loss"]),
        "images_per_second": statistics.median(float(epoch["images_per_second"]) for epoch in epochs),
        "train_seconds": round(sum(float(epoch["seconds"]) for epoch in epochs), 1),
    }
    row |= {f"{name}_at_{width}": round(scores[str(width)][name], 4) for width in WIDTHS for name in names}
    if task != "elevation":
        # At the width of the training.
        near = scores[str(crop)]["by_distance"]
        row |= {f"accuracy_{name}_from_border": value and round(value, 2) for name, value in near.items()}
    return row


@app.command()
def plot(
    table: Annotated[Path, typer.Argument(metavar="CSV", help="What `table` wrote.")],
    output: Annotated[Path, typer.Argument(metavar="PNG", help="Plot to write.")],
) -> None:
    """Draw the quality by the width of the tests' windows: a row for each task, a column for each size of crops."""
    from matplotlib.figure import Figure

    from gspn._figures import save_figure

    rows = read_csv(table)
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    crops = sorted({int(row["crop"]) for row in rows})
    figure = Figure(figsize=(1.2 + 3.1 * len(crops), 0.9 + 2.5 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(crops), sharex=True, sharey="row", squeeze=False)
    for task, line in zip(tasks, panels, strict=True):
        score, unit = ("mae", "mean error, m") if task == "elevation" else ("miou", "mIoU, %")
        line[0].set_ylabel(f"{task}: {unit}")
        for crop, panel in zip(crops, line, strict=True):
            if not any((one["task"], int(one["crop"])) == (task, crop) for one in rows):
                panel.set_axis_off()
                continue
            panel.set_title(f"trained on crops of {crop}", fontsize=10)
            panel.tick_params(labelbottom=True)
            panel.axvline(crop, color="0.8", linestyle=":")
            for place, entry in enumerate(ENTRIES):
                own = [
                    one for one in rows if (one["task"], one["encoder"], int(one["crop"])) == (task, entry.label, crop)
                ]
                if not own:
                    continue
                values = [[float(one[f"{score}_at_{width}"]) for one in own] for width in WIDTHS]
                means, low, high = ([by(some) for some in values] for by in (statistics.mean, min, max))
                panel.plot(WIDTHS, means, "-o", color=f"C{place}", label=entry.label, markersize=4)
                panel.fill_between(WIDTHS, low, high, color=f"C{place}", alpha=0.15, linewidth=0)
            panel.set_xscale("log", base=2)
            panel.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
            panel.grid(alpha=0.3)
    figure.supxlabel("side of the windows in tests", fontsize=10)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    save_figure(figure, output)


@app.command()
def images(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A run of `gspn dense train` on the Earth's climates.")],
    output: Annotated[Path, typer.Argument(metavar="IMAGE", help="PNG or JPEG to write.")],
    earth: _Earth = _EARTH,
    height: Annotated[int, typer.Option(min=64, help="Height of the maps in pixels.")] = 1024,
) -> None:
    """Draw both held-out bands beside their climates and the predicted ones, each band predicted at once."""
    import numpy as np
    import torch
    from PIL import Image

    from gspn.data import open_maps
    from gspn.tasks.dense.drawing import colour_map, side_by_side
    from gspn.tasks.dense.inference import Windows, predict_map
    from gspn.tasks.dense.model import load_model

    net, drawn, titles = load_model(model), [], []
    for split in ("val", "test"):
        data = open_maps("earth", split, earth, target="climate")
        band, climates = data.image(0), data.map(0)
        found = predict_map(np.asarray(band), net, Windows(0), device=torch.device("cpu")).numpy()
        shown = [colour_map(np.where(np.isnan(climates), np.nan, one), net.target) for one in (climates, found)]
        drawn += [band, *shown]
        titles += [f"{split}: image", "climates", "predicted"]
    with replaced(output) as part:
        side_by_side(drawn, titles, height).save(part, format=Image.registered_extensions()[output.suffix], quality=88)


@app.command()
def speed(
    crops: _Crops = list(CROPS),  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="The fewest samples of each.")] = 3,
    output: Csv = None,
) -> None:
    """Time the models in turns on one thread: inference and a training step, with their memory."""
    import torch

    from gspn.tasks.dense.config import DenseConfig
    from gspn.tasks.dense.model import Target, build_model
    from gspn.tasks.dense.transforms import Normalization

    torch.set_num_threads(1)
    rows = []
    for crop in crops:
        target = Target([str(i) for i in range(18)], [(0, 0, 0)] * 18, None, 0.0, 1.0,
                        Normalization((0.5,) * 3, (0.5,) * 3), crop)  # fmt: skip
        images = torch.randn(max(1, 256 * 256 // crop**2), 3, crop, crop)
        models = {
            entry.label: build_model(DenseConfig().changed(**entry.settings(crop)).model, target)
            for entry in ENTRIES
        }  # fmt: skip
        for mode in ("inference", "training"):

            def call(model: Any, mode: str = mode, images: torch.Tensor = images) -> None:
                with torch.set_grad_enabled(mode == "training"):
                    outputs = model(images)
                if mode == "training":
                    outputs.square().mean().backward()
                    model.zero_grad(set_to_none=True)

            calls = {label: (lambda model=model: call(model)) for label, model in models.items()}
            columns = {"mode": mode, "crop": crop, "images": len(images)}
            measured = measure_calls(calls, columns, {"times_gspn": "GSPN, global"}, repeats)
            for row in measured:
                model = models[row["entry"]]
                row["parameters"] = sum(p.numel() for p in model.parameters())
                row["encoder_parameters"] = sum(p.numel() for p in model.core.encoder.parameters())
            rows += measured
            headings = ("encoder", "parameters M", "ms", "GSPN's time / its", "peak MiB")
            print_table(
                f"{mode}, {len(images)} crops of {crop}", headings,
                ((row["entry"], f"{row['parameters'] / 1e6:.2f}", row["ms_p50"], row["times_gspn"], row["peak_mib"])
                 for row in measured),
            )  # fmt: skip
    write_csv(output, rows)


if __name__ == "__main__":
    app()

"""Small backbones side by side, with the same data and preset; GSPN with one option changed at a time; and backbones
tested at other sizes than those of their training.

    python benchmarks/compare_backbones.py run STUDY... [--jobs 2]
    python benchmarks/compare_backbones.py table STUDY...

Each run is a ``gspn classify train`` in a process of its own with one thread, so that a machine with n cores takes n
runs at a time. A run that ended is not repeated, and one that was stopped continues.
"""

from __future__ import annotations

import functools
import json
import statistics
from dataclasses import dataclass, field, replace
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
    print_table,
    read_csv,
    run_all,
    settings,
    spread,
    write_csv,
)

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Entry:
    """A row of a study: its label, its model, and settings of its own."""

    label: str
    model: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Entries that share a preset, settings and seeds; and the sizes of images that they are tested on in the end."""

    preset: str
    settings: dict[str, Any]
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...] = SEEDS
    tests: tuple[int, ...] = ()


# Peers within 10 % of the parameters of ours. Stems are those that images this small need: half the
# resolution, and 7 x 7 or 8 x 8 patches for ViT. A stem of 2 would be followed by a second halving in timm's ConvNeXt,
# so it has 1 for digits and 3 for emoji.
_MNIST_PEERS = (
    Entry("GSPN", "gspn_pico"),
    Entry(
        "ViT",
        "vit_tiny_patch16_224",
        dict(img_size=28, patch_size=4, embed_dim=128, depth=5, num_heads=4),
    ),
    Entry("ConvNeXt", "convnext_atto", dict(patch_size=1, dims=[24, 48, 96, 192], depths=[2, 2, 4, 2])),
    Entry(
        "Swin",
        "swin_tiny_patch4_window7_224",
        dict(img_size=28, patch_size=2, window_size=7, embed_dim=32, depths=[2, 2, 4], num_heads=[2, 4, 8]),
    ),
)
_EMOJI_PEERS = (
    Entry("GSPN", "gspn_nano"),
    Entry(
        "ViT",
        "vit_tiny_patch16_224",
        dict(img_size=48, patch_size=6, embed_dim=192, depth=8, num_heads=4),
    ),
    Entry("ConvNeXt", "convnext_atto", dict(patch_size=3)),
    Entry(
        "Swin",
        "swin_tiny_patch4_window7_224",
        dict(img_size=48, patch_size=2, window_size=6, embed_dim=32, depths=[2, 2, 4, 3], num_heads=[2, 4, 8, 16]),
    ),
)
_OPTIONS = (
    Entry("default: aligned, global, shared taps, proxy 8, skip, 4 directions", "gspn_pico"),
    Entry("merge as released (misaligned)", "gspn_pico", dict(alignment="official")),
    Entry("segments of 2", "gspn_pico", dict(segment=2)),
    Entry("segments of 4", "gspn_pico", dict(segment=4)),
    Entry("segments of 8", "gspn_pico", dict(segment=8)),
    Entry("per-channel taps", "gspn_pico", dict(scan=dict(groups=None))),
    Entry("proxy of 2", "gspn_pico", dict(proxy_dim=2)),
    Entry("proxy of 32", "gspn_pico", dict(proxy_dim=32)),
    Entry("no skip", "gspn_pico", dict(skip=False)),
    Entry("2 directions (down, right)", "gspn_pico", dict(directions=["down", "right"])),
    Entry("1 direction (down)", "gspn_pico", dict(directions=["down"])),
)
# What timm's models need for images of any size: ViT interpolates its position embedding and pads the last patches;
# Swin makes its masks for each image, and keeps its window where a map is smaller. ConvNeXt and GSPN need nothing.
_ANY_SIZE = {
    "ViT": dict(dynamic_img_size=True, dynamic_img_pad=True),
    "Swin": dict(strict_img_size=False, always_partition=True),
}
_ANY_SIZE_PEERS = (
    Entry("GSPN", "gspn_pico"),
    Entry("GSPN, lines of reference", "gspn_pico", dict(reference_lines=[14, 7, 4])),
    *(replace(one, kwargs={**one.kwargs, **_ANY_SIZE.get(one.label, {})}) for one in _MNIST_PEERS[1:]),
)
_SIZES = tuple(replace(one, settings={"data.sizes": [28, 56]}) for one in _ANY_SIZE_PEERS)
STUDIES = {
    "mnist5k": Study(
        "mnist5k_pico",
        {"schedule.epochs": 8, "schedule.warmup_epochs": 1, "optim.lr": 1e-3},
        _MNIST_PEERS,
    ),
    "emoji": Study(
        "emoji_nano",
        {
            "schedule.epochs": 10,
            "schedule.warmup_epochs": 1,
        },
        _EMOJI_PEERS,
    ),
    "options": Study(
        "mnist5k_pico",
        {"schedule.epochs": 5, "schedule.warmup_epochs": 1, "optim.lr": 1e-3},
        _OPTIONS,
    ),
    "sizes": Study(
        "mnist5k_pico",
        {"schedule.epochs": 12, "schedule.warmup_epochs": 1, "optim.lr": 1e-3},
        _SIZES,
        seeds=(0, 1),
        tests=(28, 42, 56, 112),
    ),
}

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")
_Studies = Annotated[list[str], typer.Argument(metavar="STUDY...", help=f"One or more of {', '.join(STUDIES)}.")]
_ROOT = Path("runs/compare_backbones")


def _chain(study: Study, entry: Entry, seed: int, output: Path) -> list[Step]:
    values = {**study.settings, "model.name": entry.model, "model.kwargs": entry.kwargs, "run.seed": seed}
    values |= entry.settings
    arguments = ["classify", "train", "--config", study.preset, *settings(values), "--output", str(output)]
    sizes = [part for size in study.tests for part in ("--size", str(size))]
    test = Step(["test", str(output), *sizes], output / "tests", script=__file__)
    return [Step(arguments, output, resumes=True), *([test] if study.tests else [])]


@app.command()
def run(
    studies: _Studies,
    root: Root = _ROOT,
    jobs: Jobs = CORES,
) -> None:
    """Train every entry of the studies with every seed."""
    # Seeds outermost: if it is stopped, every entry has as many runs as any other.
    chains = [
        _chain(STUDIES[name], entry, seed, directory(root, name, entry.label, seed))
        for seed in SEEDS
        for name in studies
        if seed in STUDIES[name].seeds
        for entry in STUDIES[name].entries
    ]
    run_all(chains, jobs)


@app.command(hidden=True)
def test(
    where: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a run.")],
    sizes: Annotated[list[int], typer.Option("--size", metavar="N", min=1, help="Size of the images. Repeatable.")],
) -> None:
    """Test the averaged weights of a run on its held-out images, resized to each size."""
    from gspn.tasks.classify import evaluate
    from gspn.tasks.classify.model import load_model, pretrained_cfg

    data = yaml.safe_load((where / "config.yaml").read_text())["data"]
    top1 = {}
    for size in sizes:
        model: Any = load_model(where / "last")
        model.pretrained_cfg = {**pretrained_cfg(model), "input_size": (3, size, size)}  # read by the preprocessing
        top1[size] = evaluate(model, data=data["name"], split=data["eval_split"], device="cpu").top1
    (where / "tests").mkdir(exist_ok=True)
    (where / "tests" / "top1.json").write_text(json.dumps(top1))


@app.command()
def table(studies: _Studies, root: Root = _ROOT, output: Csv = None) -> None:
    """Gather the runs that ended: mean and standard deviation over the seeds, and a CSV with each run."""
    rows = []
    for name in studies:
        tests = STUDIES[name].tests
        headings = (
            *("entry", "parameters M", "MACs M", "top-1 of the last epoch", "of its EMA", "seeds", "images/s"),
            *(f"at {size}" for size in tests),
        )
        shown = []
        for entry in STUDIES[name].entries:
            own = [_row(name, entry, seed, directory(root, name, entry.label, seed)) for seed in STUDIES[name].seeds]
            own = [row for row in own if row is not None]
            rows += own
            if own:
                shown.append(
                    (
                        entry.label,
                        f"{own[0]['parameters'] / 1e6:.2f}",
                        f"{own[0]['macs'] / 1e6:.1f}",
                        spread(row["top1"] for row in own),
                        spread(row["ema_top1"] for row in own),
                        len(own),
                        f"{statistics.median(row['images_per_second'] for row in own):.0f}",
                        *(spread((row[f"ema_top1_at_{size}"] for row in own), 1) for size in tests),
                    )
                )
        print_table(name, headings, shown)
    write_csv(output, rows)


def _row(study: str, entry: Entry, seed: int, where: Path) -> dict[str, Any] | None:
    if not all(step.done for step in _chain(STUDIES[study], entry, seed, where)):
        return None
    tests = json.loads((where / "tests" / "top1.json").read_text()) if STUDIES[study].tests else {}
    epochs = read_csv(where / "metrics.csv")
    last = epochs[-1]
    kwargs = yaml.safe_dump(entry.kwargs, default_flow_style=True).strip()
    parameters, macs = _size(entry.model, kwargs, STUDIES[study].preset)
    return {
        "study": study,
        "entry": entry.label,
        "model": entry.model,
        "kwargs": kwargs,
        "seed": seed,
        "epochs": len(epochs),
        "parameters": parameters,
        "macs": macs,
        "train_loss": float(last["train_loss"]),
        "eval_loss": float(last["eval_loss"]),
        "top1": float(last["top1"]),
        "ema_top1": float(last["ema_top1"]),
        "images_per_second": statistics.median(float(epoch["images_per_second"]) for epoch in epochs),
        "seconds": round(sum(float(epoch["seconds"]) for epoch in epochs), 1),
        **({"sizes": " ".join(map(str, entry.settings.get("data.sizes", [28])))} if tests else {}),
        **{f"ema_top1_at_{size}": top1 for size, top1 in tests.items()},
    }


@functools.cache
def _size(name: str, kwargs: str, preset: str) -> tuple[int, int]:
    """The parameters and multiply-adds of a model for the images of a preset."""
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import gspn.models  # noqa: F401  # registers the models

    size, classes = (48, 9) if "emoji" in preset else (28, 10)
    model = timm.create_model(name, num_classes=classes, **yaml.safe_load(kwargs)).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


if __name__ == "__main__":
    app()

"""The emoji UNet with self-attention and with the distilled adapter: the same prompts, noise and steps.

    python benchmarks/compare_text_to_image.py run [--number 240] [--split train] [--entry GSPN]
    python benchmarks/compare_text_to_image.py table [--output CSV]
    python benchmarks/compare_text_to_image.py images PNG [--scale 2]
    python benchmarks/compare_text_to_image.py speed [--output CSV]
    python benchmarks/compare_text_to_image.py starts [--output CSV]

``run`` samples images for captions of the training set and for held-out captions, at the size of the training and, by
progressive upscaling, at two and four times it, and measures them. Images that exist are not sampled again. ``starts``
distills the adapter for a few epochs from each of its starting points.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import Csv, Root, measure_calls, print_table, read_csv, write_csv
from rich.console import Console

TEACHER, ADAPTER = "gspn_text_to_image.emoji64", "gspn_adapter.emoji64"
SIDE, STEPS, GUIDANCE = 64, 25, 4.0
SCALES = {1: 240, 2: 60, 4: 24}
"""The factors of the size of the training, and the number of images for the captions of each split."""

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")
_ROOT = Path("runs/compare_text_to_image")
_Teacher = Annotated[str, typer.Option(metavar="NAME", help="Pipeline to compare with.")]
_Adapter = Annotated[str, typer.Option(metavar="NAME", help="Adapter to mount on it.")]


@dataclass(frozen=True)
class Entry:
    """A row of the comparison: its label, and whether the adapter is mounted."""

    label: str
    adapted: bool


SPLITS = ("train", "val")
ENTRIES = (Entry("self-attention", False), Entry("GSPN", True))


def _prompts(split: str, number: int) -> list[str]:
    from gspn.data import open_captions

    images = open_captions("emoji", split)
    count = min(number, len(images))
    return [images.captions(i * len(images) // count)[0] for i in range(count)]


def _directory(root: Path, entry: Entry, split: str, scale: int) -> Path:
    return root / f"{entry.label.replace(' ', '-')}-{split}-{scale}x"


@app.command()
def run(
    root: Root = _ROOT,
    teacher: _Teacher = TEACHER,
    adapter: _Adapter = ADAPTER,
    number: Annotated[
        int, typer.Option(metavar="N", min=2, help="Number of images of each split at the size of the training.")
    ] = SCALES[1],
    scales: Annotated[
        list[int] | None,
        typer.Option("--scale", metavar="N", help="Factor of the training's size. Repeatable; default: 1, 2, 4."),
    ] = None,
    splits: Annotated[
        list[str] | None,
        typer.Option("--split", metavar="NAME", help="Split whose captions are used. Repeatable; default: train, val."),
    ] = None,
    entries: Annotated[
        list[str] | None,
        typer.Option("--entry", metavar="NAME", help="self-attention or GSPN. Repeatable; default: both."),
    ] = None,
) -> None:
    """Sample with both, and measure the samples."""
    from gspn.tasks.text_to_image.evaluate import evaluate
    from gspn.tasks.text_to_image.pipelines import load_adapter, load_pipeline
    from gspn.tasks.text_to_image.sample import sample

    console = Console()
    pipeline = load_pipeline(teacher)
    mounted = load_adapter(adapter) if "GSPN" in (entries or ["GSPN"]) else None
    for scale in scales or SCALES:
        count = max(4, number * SCALES.get(scale, 24) // SCALES[1])
        for split in splits or SPLITS:
            prompts = _prompts(split, count)
            for entry in (one for one in ENTRIES if one.label in (entries or [one.label])):
                directory = _directory(root, entry, split, scale)
                samples = sample(
                    pipeline,
                    prompts,
                    adapter=mounted if entry.adapted else None,
                    output=directory,
                    height=SIDE * scale,
                    width=SIDE * scale,
                    steps=STEPS,
                    guidance=GUIDANCE,
                    upscale=scale > 1,
                    batch_size=max(1, 16 // scale**2),
                    device="cpu",
                    console=console,
                )
                if samples.drawn == len(prompts):
                    seconds = samples.seconds / max(samples.drawn, 1)
                    times = {"seconds_per_image": seconds, "threads": torch.get_num_threads()}
                    (directory / "time.json").write_text(json.dumps(times))
                # At the size of the training, which is that of the real images.
                evaluate(
                    directory, "emoji:train", size=SIDE, features="lite0", device="cpu", cache=root / "features",
                    console=console,
                ).write_json(directory / "figures.json")  # fmt: skip


@app.command()
def table(root: Root = _ROOT, output: Csv = None) -> None:
    """Gather the figures of the samples."""
    rows = []
    for scale in SCALES:
        for split in SPLITS:
            for entry in ENTRIES:
                directory = _directory(root, entry, split, scale)
                if not (directory / "figures.json").is_file():
                    continue
                figures = json.loads((directory / "figures.json").read_text())
                times = directory / "time.json"
                rows.append(
                    {
                        "entry": entry.label,
                        "size": SIDE * scale,
                        "captions": split,
                        "images": figures["sample_count"],
                        **{key: figures[key] for key in ("fid", "kid", "inception_score", "precision", "recall")},
                        **{f"text_{key}": value for key, value in figures["text"].items()},
                        **{f"real_{key}": value for key, value in (figures["real"] or {}).items()},
                        **(json.loads(times.read_text()) if times.is_file() else {}),
                        "features": figures["features"],
                        "reference": figures["reference"],
                        "steps": STEPS,
                        "guidance": GUIDANCE,
                    }
                )
    headings = ("", "px", "captions", "images", "FID", "KID x 1000", "text score", "rank", "top 1 %", "s/image")
    shown = [
        (
            row["entry"],
            row["size"],
            row["captions"],
            row["images"],
            f"{row['fid']:.1f}",
            f"{1000 * row['kid']:.1f}",
            f"{row['text_similarity']:.3f}",
            f"{row['text_rank']:g} of {row['text_candidates']}",
            f"{100 * row['text_top1']:.0f}",
            f"{row.get('seconds_per_image', float('nan')):.2f}",
        )
        for row in rows
    ]
    print_table("emoji", headings, shown)
    write_csv(output, rows)


@app.command()
def images(
    output: Annotated[Path, typer.Argument(metavar="PNG", help="Image to write.")],
    root: Root = _ROOT,
    scale: Annotated[int, typer.Option(metavar="N", help="Factor of the training's size.")] = 1,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split of the captions: train or val.")] = "train",
    number: Annotated[int, typer.Option(metavar="N", min=1, help="Number of prompts.")] = 24,
) -> None:
    """Put the samples of both under their prompts."""
    from gspn.data import load_image
    from gspn.tasks.diffusion.image_grid import draw_prompts
    from gspn.tasks.text_to_image.evaluate import prompt_of

    directories = {entry.label: _directory(root, entry, split, scale) for entry in ENTRIES}
    first = next(iter(directories.values()))
    files = sorted(first.glob("0*.png"))
    chosen = [files[i * len(files) // min(number, len(files))].name for i in range(min(number, len(files)))]
    rows = {label: [load_image(directory / name) for name in chosen] for label, directory in directories.items()}
    prompts = [prompt_of(first / name) for name in chosen]
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_prompts(rows, prompts, columns=12 if scale == 1 else 6 if scale == 2 else 3).save(output)


@app.command()
def speed(
    teacher: _Teacher = TEACHER,
    adapter: _Adapter = ADAPTER,
    scales: Annotated[
        list[int] | None,
        typer.Option("--scale", metavar="N", help="Factor of the training's size. Repeatable; default: 1 to 16."),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Latents in a call; guidance doubles an image's.")] = 2,
    output: Csv = None,
) -> None:
    """Time a call of the UNet with attention, with the adapter, and with no token mixer, in turns; and its memory."""
    import copy

    from gspn.bench.unet import PassThrough
    from gspn.diffusers.mounting import self_attention_blocks
    from gspn.tasks.text_to_image.pipelines import load_adapter, load_pipeline

    whole = load_pipeline(teacher).unet.to(memory_format=torch.channels_last)
    shared = {id(p): p for p in whole.parameters()}
    adapted, bare = copy.deepcopy(whole, dict(shared)), copy.deepcopy(whole, dict(shared))
    load_adapter(adapter).mount(adapted)
    for block in self_attention_blocks(bare).values():
        block.attn1 = PassThrough()  # type: ignore[assignment]
    unets = {"self-attention": whole, "GSPN": adapted, "no self-attention": bare}
    rows = []
    for scale in scales or (1, 2, 4, 8, 16):
        side = whole.config.sample_size * scale
        noisy, text = torch.randn(batch, 4, side, side), torch.randn(batch, 24, whole.config.cross_attention_dim)
        calls = {name: _call(unet, noisy, text) for name, unet in unets.items()}
        measured = measure_calls(calls, {"size": side * 4, "batch": batch}, {"over_attention": "self-attention"}, 5)
        floor = float(measured[-1]["ms_p50"])
        rows += [{**row, "over_floor": f"{float(row['ms_p50']) / floor:.4g}"} for row in measured]
    keys = ("size", "entry", "ms_p50", "over_attention", "over_floor", "peak_mib", "attention")
    print_table(f"batch {batch}", keys, [[row[key] for key in keys] for row in rows])
    write_csv(output, rows)


def _call(unet: Any, noisy: torch.Tensor, text: torch.Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return unet(noisy, 500, text).sample

    return call


@app.command()
def starts(
    root: Root = Path("runs/compare_starts"),
    teacher: _Teacher = TEACHER,
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Number of epochs.")] = 3,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of latents and encoded captions, shared by all.")
    ] = None,
    output: Csv = None,
) -> None:
    """Distill for a few epochs from random weights, copied projections, fitted gates, and layer by layer."""
    from gspn.tasks.text_to_image.distill import DistillConfig, distill

    settings = {
        "random": ["model.initialize=random"],
        "projections copied": ["model.initialize=copy"],
        "gates fitted": [],
        "gates fitted, layer by layer first": ["distillation.block_epochs=1"],
    }
    rows = []
    for name, overrides in settings.items():
        directory = root / name.replace(" ", "-").replace(",", "")
        config = DistillConfig.load("emoji64").changed(
            f"schedule.epochs={epochs}", "schedule.warmup_epochs=0.5", "run.eval_every=1", "samples.every=0",
            "ema.decay=null", *overrides,
            **{"run.output": directory, "teacher": teacher, "data.cache": cache or root / "cache"},
        )  # fmt: skip
        if not (directory / "last").is_dir() or len(read_csv(directory / "metrics.csv")) < epochs:
            distill(config, resume=directory.is_dir())
        rows += [{"start": name, **row} for row in read_csv(directory / "metrics.csv")]
    losses = ("eval_loss", "eval_noise", "eval_teacher", "eval_attention")
    shown = [(row["start"], row["epoch"], *(f"{float(row[key]):.4f}" for key in losses)) for row in rows]
    print_table("held-out losses after each epoch", ("start", "epoch", *losses), shown)
    write_csv(output, rows)


if __name__ == "__main__":
    app()

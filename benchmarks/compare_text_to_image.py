"""The emoji UNet with its self-attention and with the distilled adapter: the same prompts, noise and steps.

    python benchmarks/compare_text_to_image.py run [--number 240] [--split train] [--entry GSPN]
    python benchmarks/compare_text_to_image.py table [--output CSV]
    python benchmarks/compare_text_to_image.py images PNG [--scale 2]
    python benchmarks/compare_text_to_image.py speed [--output CSV]
    python benchmarks/compare_text_to_image.py starts [--output CSV]

``run`` draws the captions of the training set and of held-out images at the trained size and, with progressive
upscaling, at two and four times it, and measures them. Finished images are not drawn again. ``starts`` distils the adapter
for a few epochs from each of its starting points.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from runs import read_csv, write_csv

TEACHER, ADAPTER = "gspn_text_to_image.emoji64", "gspn_adapter.emoji64"
SIDE, STEPS, GUIDANCE = 64, 25, 4.0
SCALES = {1: 240, 2: 60, 4: 24}
"""Times the size of the training, and how many images are drawn of each split's captions."""

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
_Root = Annotated[Path, typer.Option(help="Where images and figures are kept.")]
_Teacher = Annotated[str, typer.Option(help="The pipeline.")]
_Adapter = Annotated[str, typer.Option(help="The adapter.")]


@dataclass(frozen=True)
class Entry:
    """A row of the comparison: what it is called, and whether the adapter is mounted."""

    label: str
    adapted: bool


SPLITS = ("train", "val")
ENTRIES = (Entry("self-attention", False), Entry("GSPN", True))


def _prompts(split: str, number: int) -> list[str]:
    from gspn.data import open_captions

    images = open_captions("emoji", split)
    count = min(number, len(images))
    return [images.captions(i * len(images) // count)[0] for i in range(count)]


def _place(root: Path, entry: Entry, split: str, scale: int) -> Path:
    return root / f"{entry.label.replace(' ', '-')}-{split}-{scale}x"


@app.command()
def run(
    root: _Root = Path("runs/compare_text_to_image"),
    teacher: _Teacher = TEACHER,
    adapter: _Adapter = ADAPTER,
    number: Annotated[int, typer.Option(min=2, help="Images of each split at the size of the training.")] = SCALES[1],
    scales: Annotated[
        list[int] | None, typer.Option("--scale", metavar="N", help="Repeatable; default: 1, 2, 4.")
    ] = None,
    splits: Annotated[list[str] | None, typer.Option("--split", metavar="NAME", help="Repeatable.")] = None,
    entries: Annotated[list[str] | None, typer.Option("--entry", metavar="NAME", help="Repeatable.")] = None,
) -> None:
    """Draw with both, and measure what they draw."""
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
                place = _place(root, entry, split, scale)
                found = sample(
                    pipeline,
                    prompts,
                    adapter=mounted if entry.adapted else None,
                    output=place,
                    height=SIDE * scale,
                    width=SIDE * scale,
                    steps=STEPS,
                    guidance=GUIDANCE,
                    upscale=scale > 1,
                    batch_size=max(1, 16 // scale**2),
                    device="cpu",
                    console=console,
                )
                seconds = found.seconds / max(found.drawn, 1)
                figures = place / "figures.json"
                if found.drawn == len(prompts):
                    kept = {"seconds_per_image": seconds, "threads": torch.get_num_threads()}
                    (place / "time.json").write_text(json.dumps(kept))
                # At the size of the training, which is that of the real images.
                evaluate(
                    place, "emoji:train", size=SIDE, features="lite0", device="cpu", cache=root / "features",
                    console=console,
                ).write_json(figures)  # fmt: skip


@app.command()
def table(
    root: _Root = Path("runs/compare_text_to_image"),
    output: Annotated[Path | None, typer.Option(metavar="CSV", help="One row for each set of images.")] = None,
) -> None:
    """Gather the figures of what was drawn."""
    rows = []
    for scale in SCALES:
        for split in SPLITS:
            for entry in ENTRIES:
                place = _place(root, entry, split, scale)
                if not (place / "figures.json").is_file():
                    continue
                found = json.loads((place / "figures.json").read_text())
                timed = json.loads((place / "time.json").read_text()) if (place / "time.json").is_file() else {}
                rows.append(
                    {
                        "entry": entry.label,
                        "size": SIDE * scale,
                        "captions": split,
                        "images": found["sample_count"],
                        **{key: found[key] for key in ("fid", "kid", "inception_score", "precision", "recall")},
                        **{f"text_{key}": value for key, value in found["text"].items()},
                        **{f"real_{key}": value for key, value in (found["real"] or {}).items()},
                        **timed,
                        "features": found["features"],
                        "reference": found["reference"],
                        "steps": STEPS,
                        "guidance": GUIDANCE,
                    }
                )
    shown = Table(title="emoji", title_justify="left", title_style="bold")
    for heading in (
        "",
        "px",
        "captions",
        "images",
        "FID",
        "KID x 1000",
        "text score",
        "rank",
        "top 1 %",
        "s/image",
    ):
        shown.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        shown.add_row(
            row["entry"],
            str(row["size"]),
            row["captions"],
            str(row["images"]),
            f"{row['fid']:.1f}",
            f"{1000 * row['kid']:.1f}",
            f"{row['text_similarity']:.3f}",
            f"{row['text_rank']:g} of {row['text_candidates']}",
            f"{100 * row['text_top1']:.0f}",
            f"{row.get('seconds_per_image', float('nan')):.2f}",
        )
    Console(width=140).print(shown)
    if output is not None and rows:
        keys = list(dict.fromkeys(key for row in rows for key in row))
        write_csv(output, [{key: row.get(key, "") for key in keys} for row in rows])


@app.command()
def images(
    output: Annotated[Path, typer.Argument(metavar="PNG")],
    root: _Root = Path("runs/compare_text_to_image"),
    scale: Annotated[int, typer.Option(metavar="N", help="Times the size of the training.")] = 1,
    split: Annotated[str, typer.Option(metavar="NAME", help="Whose captions: train or val.")] = "train",
    number: Annotated[int, typer.Option(metavar="N", min=1)] = 24,
) -> None:
    """Put what both drew under its prompts."""
    from PIL import Image

    from gspn.tasks.diffusion.image_grid import draw_prompts
    from gspn.tasks.text_to_image.evaluate.evaluation import prompt_of

    places = {entry.label: _place(root, entry, split, scale) for entry in ENTRIES}
    files = sorted(next(iter(places.values())).glob("0*.png"))
    chosen = [files[i * len(files) // min(number, len(files))].name for i in range(min(number, len(files)))]
    rows = {label: [Image.open(place / name) for name in chosen] for label, place in places.items()}
    prompts = [prompt_of(next(iter(places.values())) / name) for name in chosen]
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_prompts(rows, prompts, columns=12 if scale == 1 else 6 if scale == 2 else 3).save(output)


@app.command()
def speed(
    teacher: _Teacher = TEACHER,
    adapter: _Adapter = ADAPTER,
    scales: Annotated[list[int] | None, typer.Option("--scale", metavar="N")] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Latents in a call; guidance doubles an image's.")] = 2,
    output: Annotated[Path | None, typer.Option(metavar="CSV")] = None,
) -> None:
    """Time a call of the UNet with attention, with the adapter, and with neither, taking turns; and its memory."""
    import copy

    from gspn.bench import environment
    from gspn.bench.comparison import attention_backend, peak_memory
    from gspn.bench.timing import Candidate, time_interleaved
    from gspn.bench.unet import PassThrough
    from gspn.diffusers.mounting import self_attention_blocks
    from gspn.tasks.text_to_image.pipelines import load_adapter, load_pipeline

    device = torch.device("cpu")
    whole = load_pipeline(teacher).unet.to(memory_format=torch.channels_last)
    shared = {id(p): p for p in whole.parameters()}
    adapted, bare = copy.deepcopy(whole, dict(shared)), copy.deepcopy(whole, dict(shared))
    load_adapter(adapter).mount(adapted)
    for block in self_attention_blocks(bare).values():
        block.attn1 = PassThrough()  # type: ignore[assignment]
    unets = {"self-attention": whole, "GSPN": adapted, "no self-attention": bare}
    here, rows = environment.describe(device), []
    for scale in scales or (1, 2, 4, 8, 16):
        side = whole.config.sample_size * scale
        noisy, text = torch.randn(batch, 4, side, side), torch.randn(batch, 24, whole.config.cross_attention_dim)
        calls = {name: _call(unet, noisy, text) for name, unet in unets.items()}
        timed = time_interleaved(
            [Candidate(name, call) for name, call in calls.items()], device, repeats=5, min_time=0.1
        )
        for name, call in calls.items():
            rows.append(
                {
                    "entry": name,
                    "size": side * 4,
                    "batch": batch,
                    "ms_p50": f"{timed[name].p50:.5g}",
                    "over_attention": f"{timed['self-attention'].p50 / timed[name].p50:.4g}",
                    "over_floor": f"{timed[name].p50 / timed['no self-attention'].p50:.4g}",
                    "peak_mib": f"{(peak_memory(call, device) or 0) / 2**20:.1f}",
                    "attention": attention_backend(call),
                    "device": here.device,
                    "threads": here.threads,
                    "torch": here.torch,
                }
            )
    shown = Table(title=f"batch {batch}, {here.device}, {here.threads} threads", title_justify="left")
    keys = ("size", "entry", "ms_p50", "over_attention", "over_floor", "peak_mib", "attention")
    for heading in keys:
        shown.add_column(heading)
    for row in rows:
        shown.add_row(*(str(row[key]) for key in keys))
    Console(width=140).print(shown)
    if output is not None:
        write_csv(output, rows)


def _call(unet: Any, noisy: torch.Tensor, text: torch.Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return unet(noisy, 500, text).sample

    return call


@app.command()
def starts(
    root: _Root = Path("runs/compare_starts"),
    teacher: _Teacher = TEACHER,
    epochs: Annotated[int, typer.Option(metavar="N", min=1)] = 3,
    cache: Annotated[Path | None, typer.Option(metavar="DIR", help="data.cache, shared by all.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="CSV", help="One row an epoch of each.")] = None,
) -> None:
    """Distil for a few epochs from nothing, from the attention's projections, from fitted gates, and layer by layer."""
    from gspn.tasks.text_to_image.distill import DistillConfig, distill

    settings = {
        "random": ["model.initialize=random"],
        "projections copied": ["model.initialize=copy"],
        "gates fitted": [],
        "gates fitted, layer by layer first": ["distillation.block_epochs=1"],
    }
    rows = []
    for name, overrides in settings.items():
        place = root / name.replace(" ", "-").replace(",", "")
        config = DistillConfig.load("emoji64").changed(
            f"schedule.epochs={epochs}", "schedule.warmup_epochs=0.5", "run.eval_every=1", "samples.every=0",
            "ema.decay=null", *overrides,
            **{"run.output": place, "teacher": teacher, "data.cache": cache or root / "cache"},
        )  # fmt: skip
        if not (place / "last").is_dir() or len(read_csv(place / "metrics.csv")) < epochs:
            distill(config, resume=place.is_dir())
        rows += [{"start": name, **row} for row in read_csv(place / "metrics.csv")]
    shown = Table(title="held-out losses after each epoch", title_justify="left")
    keys = ("start", "epoch", "eval_loss", "eval_noise", "eval_teacher", "eval_attention")
    for heading in keys:
        shown.add_column(heading)
    for row in rows:
        shown.add_row(*(row[key] if key in ("start", "epoch") else f"{float(row[key]):.4f}" for key in keys))
    Console(width=140).print(shown)
    if output is not None:
        write_csv(output, rows)


if __name__ == "__main__":
    app()

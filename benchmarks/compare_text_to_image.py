"""The emoji UNet with self-attention, and with GSPN in its place: the same prompts, noise and steps.

    python benchmarks/compare_text_to_image.py run [--size 64] [--split train] [--seed 0] [--entry GSPN] [--before DIR]
    python benchmarks/compare_text_to_image.py table [--output CSV]
    python benchmarks/compare_text_to_image.py images PNG [--size 128]
    python benchmarks/compare_text_to_image.py solvers [--scheduler dpm++] [--steps 8] [--guidance 4] [--output CSV]
    python benchmarks/compare_text_to_image.py layers [--output CSV]
    python benchmarks/compare_text_to_image.py speed [--output CSV]
    python benchmarks/compare_text_to_image.py starts [--output CSV]

``run`` samples images for captions of the training set and for held-out captions, at the size of the training and, by
progressive upscaling, at two, four and eight times it, with two seeds, and measures them. What exists is neither
sampled nor measured again, so a stopped run continues. ``table`` gathers what there is. ``solvers`` samples held-out
captions at the size of the training with each scheduler, number of steps and guidance. ``layers`` samples the same with
self-attention kept in some layers. ``starts`` distills the adapter for a few epochs from each of its starting points.

``run --before DIR`` adds the models of an earlier version, ``DIR/gspn_text_to_image.emoji64`` with
``DIR/gspn_adapter.emoji64``. ``run --reference DIR`` compares images of more than 64 pixels with real ones of their own
size, which ``python scripts/build_emoji_styles.py DIR --style noto --size 256`` renders; else with ``emoji:train``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import Csv, Root, measure_calls, print_table, read_csv, spread, write_csv
from rich.console import Console

TEACHER, ADAPTER = "gspn_text_to_image.emoji", "gspn_adapter.emoji"
BEFORE = ("gspn_text_to_image.emoji64", "gspn_adapter.emoji64")
TRAINED, SCHEDULER, STEPS, GUIDANCE = 64, "dpm++", 12, 4.0
IMAGES = {64: 120, 128: 40, 256: 16, 512: 4}
"""The number of images of a size for the captions of each split, with each seed."""
LARGEST_REFERENCE = 256  # the features are computed at 224 pixels
SPLITS = ("train", "val")
SEEDS = (0, 1)
LABELS = ("self-attention", "GSPN", "GSPN before")
SOLVERS = ("ddim", "dpm++", "unipc", "euler")

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")
_ROOT = Path("runs/compare_text_to_image")
_Teacher = Annotated[str, typer.Option(metavar="NAME", help="Pipeline to compare with.")]
_Adapter = Annotated[str, typer.Option(metavar="NAME", help="Adapter to mount on it.")]


@dataclass(frozen=True)
class Cell:
    """Images of one entry, size, split and seed, and their directory."""

    label: str
    size: int
    split: str
    seed: int
    direct: bool = False
    """Sampled in a single stage, although larger than the size of the training."""

    def directory(self, root: Path) -> Path:
        """Where the images and their figures are."""
        direct = "-direct" if self.direct else ""
        return root / f"{self.label.replace(' ', '-')}-{self.split}-{self.size}{direct}-seed{self.seed}"

    def figures(self, root: Path) -> dict[str, Any] | None:
        """The figures of the images; None before they are measured."""
        file = self.directory(root) / "figures.json"
        return json.loads(file.read_text()) if file.is_file() else None


def _cells(
    sizes: Iterable[int] | None = None,
    splits: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    labels: Iterable[str] | None = None,
    direct: Iterable[bool] = (False, True),
) -> list[Cell]:
    return [
        Cell(label, size, split, seed, one)
        for seed in seeds or SEEDS
        for size in sizes or IMAGES
        for one in direct
        for split in splits or SPLITS
        for label in labels or LABELS
    ]


def _prompts(split: str, number: int) -> list[str]:
    from gspn.data import open_captions

    images = open_captions("emoji", split)
    count = min(number, len(images))
    return [images.captions(i * len(images) // count)[0] for i in range(count)]


@app.command()
def run(
    root: Root = _ROOT,
    teacher: _Teacher = TEACHER,
    adapter: _Adapter = ADAPTER,
    before: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of an earlier version's pipeline and adapter.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of larger real images, in the style noto alone.")
    ] = None,
    number: Annotated[
        int, typer.Option(metavar="N", min=2, help="Number of images of each split at the size of the training.")
    ] = IMAGES[TRAINED],
    sizes: Annotated[
        list[int] | None,
        typer.Option("--size", metavar="N", help="Size in pixels. Repeatable; default: 64, 128, 256, 512."),
    ] = None,
    splits: Annotated[
        list[str] | None,
        typer.Option("--split", metavar="NAME", help="Split whose captions are used. Repeatable; default: train, val."),
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", metavar="N", help="Seed of the noise. Repeatable; default: 0, 1.")
    ] = None,
    entries: Annotated[
        list[str] | None,
        typer.Option("--entry", metavar="NAME", help=f"{', '.join(LABELS)}. Repeatable; default: all there are."),
    ] = None,
    direct: Annotated[bool, typer.Option("--direct", help="Sample larger images in a single stage.")] = False,
) -> None:
    """Sample with each, and measure the samples."""
    from gspn.tasks.text_to_image.evaluate import Reference, evaluate
    from gspn.tasks.text_to_image.pipelines import load_adapter, load_pipeline
    from gspn.tasks.text_to_image.sample import sample

    console = Console()
    models: dict[str, tuple[str, str | None]] = {"self-attention": (teacher, None), "GSPN": (teacher, adapter)}
    if before is not None:
        models["GSPN before"] = (str(before / BEFORE[0]), str(before / BEFORE[1]))
    labels = [label for label in models if label in (entries or models)]
    pipelines: dict[str, Any] = {}
    adapters: dict[str, Any] = {}
    references: dict[int, Reference] = {}
    for cell in _cells(sizes, splits, seeds, labels, [direct]):
        scale, directory = cell.size // TRAINED, cell.directory(root)
        prompts = _prompts(cell.split, max(4, number * IMAGES.get(cell.size, IMAGES[512]) // IMAGES[TRAINED]))
        large = reference is not None and cell.size > TRAINED
        against = {"reference": "folder:train" if large else "emoji:train", "sample_count": len(prompts)}
        figures = cell.figures(root)
        if figures is not None and against.items() <= figures.items():
            continue
        source, mounted = models[cell.label]
        if source not in pipelines:
            pipelines[source] = load_pipeline(source)
        if mounted is not None and mounted not in adapters:
            adapters[mounted] = load_adapter(mounted)
        samples = sample(
            pipelines[source],
            prompts,
            adapter=None if mounted is None else adapters[mounted],
            output=directory,
            height=cell.size,
            width=cell.size,
            steps=STEPS,
            guidance=GUIDANCE,
            scheduler=SCHEDULER,
            seed=cell.seed,
            upscale=scale > 1 and not direct,
            batch_size=max(1, 16 // scale**2),
            device="cpu",
            console=console,
        )
        if samples.drawn == len(prompts):
            times = {"seconds_per_image": samples.seconds / len(prompts), "threads": torch.get_num_threads()}
            (directory / "time.json").write_text(json.dumps(times))
        size = min(cell.size, LARGEST_REFERENCE) if large else TRAINED
        if size not in references:
            references[size] = Reference(against["reference"], size, size, root=reference if large else None)
        evaluate(
            directory, references[size], size=size, features="lite0", device="cpu", cache=root / "features",
            console=console,
        ).write_json(directory / "figures.json")  # fmt: skip


@app.command()
def table(root: Root = _ROOT, output: Csv = None) -> None:
    """Gather the figures of the samples: the mean over the seeds, and the standard deviation; the CSV has each seed."""
    rows = []
    for cell in _cells():
        figures = cell.figures(root)
        if figures is None:
            continue
        times = cell.directory(root) / "time.json"
        rows.append(
            {
                "entry": cell.label + ", direct" * cell.direct,
                "size": cell.size,
                "captions": cell.split,
                "seed": cell.seed,
                "images": figures["sample_count"],
                **{key: figures[key] for key in ("fid", "kid", "inception_score", "precision", "recall")},
                **{f"text_{key}": value for key, value in figures["text"].items()},
                **{f"real_{key}": value for key, value in (figures["real"] or {}).items()},
                **(json.loads(times.read_text()) if times.is_file() else {}),
                "features": figures["features"],
                "reference": figures["reference"],
                "scheduler": SCHEDULER,
                "steps": STEPS,
                "guidance": GUIDANCE,
            }
        )
    headings = ("", "px", "captions", "images", "FID", "KID x 1000", "text score", "rank", "top 1 %", "s/image")
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["size"], row["captions"], row["entry"]), []).append(row)
    shown = [
        (
            entry,
            size,
            split,
            f"{some[0]['images']} x {len(some)}",
            spread((row["fid"] for row in some), 1),
            spread((1000 * row["kid"] for row in some), 1),
            spread((row["text_similarity"] for row in some), 3),
            f"{spread((row['text_rank'] for row in some), 1)} of {some[0]['text_candidates']}",
            spread((100 * row["text_top1"] for row in some), 0),
            f"{some[0].get('seconds_per_image', float('nan')):.2f}",
        )
        for (size, split, entry), some in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] != "train"))
    ]
    print_table("emoji", headings, shown)
    write_csv(output, rows)


@app.command()
def images(
    output: Annotated[Path, typer.Argument(metavar="PNG", help="Image to write.")],
    root: Root = _ROOT,
    size: Annotated[int, typer.Option(metavar="N", help="Size in pixels.")] = TRAINED,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split of the captions: train or val.")] = "train",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the noise.")] = SEEDS[0],
    number: Annotated[int, typer.Option(metavar="N", min=1, help="Number of prompts.")] = 24,
) -> None:
    """Put the samples of each under their prompts."""
    from gspn.data import load_image
    from gspn.tasks.diffusion.image_grid import draw_prompts
    from gspn.tasks.text_to_image.evaluate import prompt_of

    cells = [cell for cell in _cells([size], [split], [seed]) if cell.figures(root) is not None]
    if not cells:
        raise typer.BadParameter(f"{root} has no images of {size} pixels; run first.", param_hint="--size")
    directories = {cell.label + ", direct" * cell.direct: cell.directory(root) for cell in cells}
    first = cells[0].directory(root)
    files = sorted(first.glob("0*.png"))
    chosen = [files[i * len(files) // min(number, len(files))].name for i in range(min(number, len(files)))]
    rows = {label: [load_image(directory / name) for name in chosen] for label, directory in directories.items()}
    prompts = [prompt_of(first / name) for name in chosen]
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_prompts(rows, prompts, columns=max(2, 12 * TRAINED // size)).save(output)


@app.command()
def solvers(
    root: Root = Path("runs/compare_solvers"),
    teacher: _Teacher = TEACHER,
    adapter: _Adapter = ADAPTER,
    entries: Annotated[
        list[str] | None, typer.Option("--entry", metavar="NAME", help=f"{' or '.join(LABELS[:2])}. Repeatable.")
    ] = None,
    schedulers: Annotated[
        list[str] | None,
        typer.Option("--scheduler", metavar="NAME", help=f"Repeatable; default: {', '.join(SOLVERS)}."),
    ] = None,
    steps: Annotated[list[int] | None, typer.Option(metavar="N", help="Repeatable; default: 4, 6, 8, 12, 25.")] = None,
    guidances: Annotated[
        list[float] | None, typer.Option("--guidance", metavar="SCALE", help=f"Repeatable; default: {GUIDANCE:g}.")
    ] = None,
    number: Annotated[int, typer.Option(metavar="N", min=2, help="Number of images.")] = 60,
    output: Csv = None,
) -> None:
    """Sample held-out captions with each scheduler, number of steps and guidance, and measure the samples."""
    from gspn.tasks.text_to_image.pipelines import load_adapter, load_pipeline

    prompts, rows = _prompts("val", number), []
    pipeline, mounted = load_pipeline(teacher), {"self-attention": None, "GSPN": adapter}
    for label, scheduler, count, guidance in itertools.product(
        entries or mounted, schedulers or SOLVERS, steps or (4, 6, 8, 12, 25), guidances or (GUIDANCE,)
    ):
        figures = _measured(
            pipeline, prompts, root, f"{label}-{scheduler}-{count}-{guidance:g}",
            adapter=None if mounted[label] is None else load_adapter(adapter), steps=count, guidance=guidance,
            scheduler=scheduler, batch_size=20,
        )  # fmt: skip
        rows.append(
            {
                "entry": label, "scheduler": scheduler, "steps": count, "guidance": guidance, "images": len(prompts),
                **figures,
            }
        )  # fmt: skip
    shown = [
        (
            row["entry"], row["scheduler"], row["steps"], f"{row['guidance']:g}", f"{row['fid']:.1f}",
            f"{1000 * row['kid']:.1f}", f"{row['text_similarity']:.3f}", f"{row['text_rank']:g}",
        )
        for row in rows
    ]  # fmt: skip
    headings = ("", "scheduler", "steps", "guidance", "FID", "KID x 1000", "text score", "rank")
    print_table(f"{len(prompts)} held-out captions, {TRAINED} pixels", headings, shown)
    write_csv(output, rows)


@app.command()
def layers(
    root: Root = Path("runs/compare_layers"),
    teacher: _Teacher = TEACHER,
    adapter: _Adapter = ADAPTER,
    number: Annotated[int, typer.Option(metavar="N", min=2, help="Number of images.")] = IMAGES[TRAINED],
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", metavar="N", help="Seed of the noise. Repeatable; default: 0, 1.")
    ] = None,
    output: Csv = None,
) -> None:
    """Sample held-out captions with self-attention in all layers, in those of one level, and in none.

    The error is that of the mixers for the inputs of the teacher's attentions, as a share of their outputs' variance.
    """
    from gspn.diffusers import GSPNAdapter
    from gspn.tasks.text_to_image.pipelines import load_adapter, load_pipeline

    prompts, rows = _prompts("val", number), []
    pipeline, whole = load_pipeline(teacher), load_adapter(adapter)
    of_layers, weights = whole.config["layers"], whole.state_dict()
    levels = list(dict.fromkeys(name.split(".attentions")[0] for name in of_layers))
    errors = _errors(pipeline, whole, levels, prompts[::5])
    for kept, seed in itertools.product(("all", *levels, "none"), seeds or SEEDS):
        left = {} if kept == "all" else {k: v for k, v in of_layers.items() if not k.startswith(kept)}
        part = None
        if left:
            part = GSPNAdapter.from_config({**whole.config, "layers": left})
            part.load_state_dict({k: weights[k] for k in part.state_dict()})
        figures = _measured(
            pipeline, prompts, root, f"{kept}-seed{seed}", adapter=part, steps=STEPS, guidance=GUIDANCE,
            scheduler=SCHEDULER, seed=seed, batch_size=16,
        )  # fmt: skip
        rows.append(
            {
                "self_attention": kept, "layers": len(of_layers) - len(left), "seed": seed, "images": len(prompts),
                "error": errors.get(kept), **figures,
            }
        )  # fmt: skip
    shown = []
    for kept in dict.fromkeys(row["self_attention"] for row in rows):
        some = [row for row in rows if row["self_attention"] == kept]
        shown.append(
            (
                kept, some[0]["layers"], f"{100 * errors[kept]:.0f}" if kept in errors else "",
                spread((row["fid"] for row in some), 1),
                spread((1000 * row["kid"] for row in some), 1),
                spread((row["text_similarity"] for row in some), 3), spread((row["text_rank"] for row in some), 1),
            )
        )  # fmt: skip
    headings = ("self-attention in", "layers", "GSPN's error there, %", "FID", "KID x 1000", "text score", "rank")
    print_table(f"{len(prompts)} held-out captions, {TRAINED} pixels", headings, shown)
    write_csv(output, rows)


def _measured(pipeline: Any, prompts: list[str], root: Path, name: str, **how: Any) -> dict[str, Any]:
    """The figures of samples at the size of the training, in ``root / name``; what exists is not sampled again."""
    from gspn.tasks.text_to_image.evaluate import Reference, evaluate
    from gspn.tasks.text_to_image.sample import sample

    console, file = Console(), root / name / "figures.json"
    if not file.is_file():
        sample(pipeline, prompts, output=file.parent, device="cpu", check=False, console=console, **how)
        real = Reference("emoji:train", TRAINED, TRAINED)
        evaluate(
            file.parent, real, features="lite0", device="cpu", cache=root / "features", console=console
        ).write_json(file)
    figures = json.loads(file.read_text())
    text = {f"text_{key}": value for key, value in figures["text"].items()}
    return {"fid": figures["fid"], "kid": figures["kid"], **text}


def _errors(pipeline: Any, adapter: Any, levels: Iterable[str], prompts: list[str]) -> dict[str, float]:
    """The mixers' squared error by level, over the variance of the attentions' outputs, while the teacher samples."""
    from gspn.tasks.core.attention_matching import recorded

    unet, mixers = pipeline.unet, adapter.mixers
    attentions = {name: unet.get_submodule(name) for name in mixers}
    sums = {level: [0.0, 0.0] for level in levels}

    def compare(*_: Any) -> None:
        for name, (x, output) in found.items():
            level = next(one for one in levels if name.startswith(one))
            side = round(x.shape[1] ** 0.5)
            sums[level][0] += (mixers[name](x, map_size=(side, side)) - output).square().sum().item()
            sums[level][1] += (output - output.mean((0, 1))).square().sum().item()
        found.clear()  # each module is recorded at its first call

    with torch.inference_mode(), recorded(attentions) as found:
        hook = unet.register_forward_hook(compare)
        pipeline(
            prompts, height=TRAINED, width=TRAINED, num_inference_steps=STEPS // 2, guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(0), output_type="pt",
        )  # fmt: skip
        hook.remove()
    return {level: error / variance for level, (error, variance) in sums.items()}


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

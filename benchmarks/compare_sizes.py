"""Denoisers beyond the size of their training: digits of 28, 56 and 112 pixels, drawn directly and by stages.

    python benchmarks/compare_sizes.py run STUDY... [--jobs 2]
    python benchmarks/compare_sizes.py table STUDY... [--output CSV]
    python benchmarks/compare_sizes.py images PNG STUDY

The study ``further`` starts from the result of the preset ``mnist5k``, which knows one size, and continues it over two
as the preset ``mnist5k_sizes`` does; it needs ``runs/class_conditional_mnist5k``. The study ``forms`` trains a smaller
denoiser from nothing with each form of the scan. Drawn digits are compared with 1,000 of the training. A run is a
process with one thread; it continues where it was stopped, and what it ended is not repeated.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from common import CORES, Csv, Jobs, Root, Step, directory, print_table, read_csv, run_all, spread, write_csv

SIZE, LINES = 28, 14  # of the images, and of the patches' map
STEPS, GUIDANCE, STRENGTH = 12, 2.0, 0.6
REFERENCE, REFERENCES, CLASSIFIER = "mnist5k:train", 1000, "gspn_pico.mnist5k"
ONE_SIZE = "runs/class_conditional_mnist5k"


@dataclass(frozen=True)
class Entry:
    """A row: a training, or what draws without one.

    Attributes:
        label: Its name.
        settings: Of the training, beside those of the study.
        form: One of ``scan_forms.FORMS`` in place of the library's scan; None for the library's.
        weights: A trained pipeline that draws, with the model's options in ``settings``; None: the entry is trained.
        real: Whether held-out digits are measured in the place of drawn ones.
    """

    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    form: str | None = None
    weights: str | None = None
    real: bool = False


@dataclass(frozen=True)
class Drawing:
    """A set of images: its size, their number, and what they start from.

    Attributes:
        size: Height and width.
        number: Of images.
        start: The drawing that is enlarged, noised to ``STRENGTH`` and denoised again; None: pure noise.
    """

    size: int
    number: int
    start: str | None = None


@dataclass(frozen=True)
class Study:
    """Entries that share a preset, settings, seeds and the names of what they draw."""

    preset: str
    settings: dict[str, Any]
    entries: tuple[Entry, ...]
    drawings: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1)


DRAWINGS = {
    "28": Drawing(28, 100),
    "56": Drawing(56, 100),
    "56 in stages": Drawing(56, 100, "28"),
    "112": Drawing(112, 25),
    "112 in stages": Drawing(112, 25, "56 in stages"),
}


def _model(dim: int, num_layers: int, **scan: Any) -> dict[str, Any]:
    return {"model.options": {"dim": dim, "num_layers": num_layers, "scan": {"skip": True, **scan}}}


_PAPER, _LINES = _model(96, 6), _model(96, 6, reference_lines=LINES)
# A batch has as many pixels as one of data.size, which is 56 in the preset: these have a quarter of the images at 56.
_FEW = {"data.size": 28, "schedule.epochs": 8, "schedule.min_lr": 3e-4}
_FURTHER = (
    Entry("28 px, paper's scan", _PAPER, weights=ONE_SIZE),
    Entry("28 px, reference lines", _LINES, weights=ONE_SIZE),
    Entry("28 and 56 px, paper's scan", {**_PAPER, **_FEW}),
    Entry("28 and 56 px, reference lines", {**_LINES, **_FEW}),
    Entry("as many images of each size, falling rate", _LINES),
    Entry("held-out digits", real=True),
)
# Taps and gates of the forms are written to memory, which costs less for groups of channels than for each channel.
_FORMS = (
    Entry("paper's scan", _model(48, 4)),
    Entry("reference lines", _model(48, 4, reference_lines=LINES)),
    Entry("average", _model(48, 4), "average"),
    Entry("forget gate, 8 groups", _model(48, 4, groups=8), "forget"),
    Entry("convex, 8 groups", _model(48, 4, groups=8), "convex"),
    Entry("attention", {"model.name": "attention", "model.options": {"dim": 44, "num_layers": 4}}),
)
STUDIES = {
    "further": Study("mnist5k_sizes", {}, _FURTHER, tuple(DRAWINGS)),
    "forms": Study(
        "mnist5k",
        {"data.sizes": [28, 56], "data.batch_size": 16, "schedule.epochs": 8},
        _FORMS,
        tuple(name for name, drawing in DRAWINGS.items() if drawing.start is None),
    ),
}

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")
_Studies = Annotated[list[str] | None, typer.Argument(metavar="STUDY...", help=f"Of {', '.join(STUDIES)}; all.")]
_ROOT = Path("runs/compare_sizes")


@app.command()
def run(studies: _Studies = None, root: Root = _ROOT, jobs: Jobs = CORES) -> None:
    """Train, draw and measure every entry of the studies with every seed, in the order of their importance."""
    chains = [
        [Step(["one", name, entry.label, str(seed), "--root", str(root)], where, script=__file__)]
        for name, entry, seed, where in _runs(studies, root)
    ]
    run_all(chains, jobs)


@app.command(hidden=True)
def one(study: str, label: str, seed: int, root: Root = _ROOT) -> None:
    """Train an entry, draw with it and measure what it drew; what is there is kept."""
    entry = next(entry for entry in STUDIES[study].entries if entry.label == label)
    where = directory(root, study, label, seed)
    where.mkdir(parents=True, exist_ok=True)
    with _built_with(entry.form):
        if not entry.real and entry.weights is None and not (where / "trained").exists():
            _train(STUDIES[study], entry, seed, where)
            (where / "trained").touch()
        pipeline = None if entry.real else _load(entry, where)
    for name in STUDIES[study].drawings:
        path, drawing = _drawn(where, name), DRAWINGS[name]
        if not path.exists() and pipeline is not None:
            _draw(pipeline, drawing, None if drawing.start is None else _drawn(where, drawing.start), seed, path)
        elif not path.exists():
            _enlarge(drawing, path)
        if not path.with_suffix(".json").exists():
            _measure(path, root / "features")


@app.command()
def table(studies: _Studies = None, root: Root = _ROOT, output: Csv = None) -> None:
    """Gather the drawings that were measured: mean and deviation over the seeds, and a CSV with each."""
    rows = [row for name, entry, seed, where in _runs(studies, root) for row in _rows(name, entry, seed, where)]
    for study in dict.fromkeys(row["study"] for row in rows):
        shown = []
        for entry in STUDIES[study].entries:
            own = [row for row in rows if row["study"] == study and row["entry"] == entry.label]
            cells = []
            for name in STUDIES[study].drawings:
                of = [row for row in own if row["drawing"] == name]
                cells.append(
                    f"{spread((row['fid'] for row in of), 1)} / {spread((1000 * row['kid'] for row in of), 1)} / "
                    f"{spread((100 * row['consistency'] for row in of), 1)} %"
                    if of
                    else ""
                )
            if own:
                shown.append((entry.label, len({row["seed"] for row in own}), *cells))
        title = f"{study}: FID / KID x 1000 / of its class"
        print_table(title, ("", "seeds", *STUDIES[study].drawings), shown, width=200)
    write_csv(output, rows)


@app.command()
def images(
    output: Annotated[Path, typer.Argument(metavar="PNG", help="Image to write.")],
    study: Annotated[str, typer.Argument(metavar="STUDY", help=f"One of {', '.join(STUDIES)}.")],
    root: Root = _ROOT,
    pixels: Annotated[int, typer.Option(metavar="N", min=1, help="Height and width of a digit in the image.")] = 56,
) -> None:
    """Draw the first ten digits of every drawing of the first seed, an entry a row, all at one size."""
    import numpy as np
    from PIL import Image, ImageDraw

    chosen = [(entry, where) for _, entry, seed, where in _runs([study], root) if seed == STUDIES[study].seeds[0]]
    names = STUDIES[study].drawings
    chosen = [one for one in chosen if any(_drawn(one[1], name).exists() for name in names)]
    if not chosen:
        raise typer.BadParameter(f"{root} has no drawings of {study}; start with the command run.")
    gap, line = 12, 16
    wide, tall = 5 * pixels + gap, 2 * pixels + line + gap
    whole = Image.new("RGB", (gap + len(names) * wide, gap + len(chosen) * tall), "white")
    pen = ImageDraw.Draw(whole)
    for row, (entry, where) in enumerate(chosen):
        for column, name in enumerate(names):
            x, y = gap + column * wide, gap + row * tall
            pen.text((x, y), f"{entry.label}: {name}", fill=(31, 31, 51))
            if _drawn(where, name).exists():
                for i, digit in enumerate(np.load(_drawn(where, name))["arr_0"][:10]):
                    digit = Image.fromarray(digit).resize((pixels, pixels), Image.Resampling.LANCZOS)
                    whole.paste(digit, (x + i % 5 * pixels, y + line + i // 5 * pixels))
    output.parent.mkdir(parents=True, exist_ok=True)
    whole.save(output)


def _runs(studies: list[str] | None, root: Path) -> Iterator[tuple[str, Entry, int, Path]]:
    """The study, the entry, the seed and the directory of every run; seeds outermost."""
    for name in studies or STUDIES:
        for seed in STUDIES[name].seeds:
            for entry in STUDIES[name].entries:
                yield name, entry, seed, directory(root, name, entry.label, seed)


def _drawn(where: Path, name: str) -> Path:
    return where / f"{name.replace(' ', '-')}.npz"


def _built_with(form: str | None) -> contextlib.AbstractContextManager[None]:
    if form is None:
        return contextlib.nullcontext()
    from scan_forms import denoisers_scan_with

    return denoisers_scan_with(form)


def _train(study: Study, entry: Entry, seed: int, where: Path) -> None:
    from gspn.tasks.class_conditional import ClassConditionalConfig, train

    config = ClassConditionalConfig.load(study.preset).changed(
        **study.settings,
        **entry.settings,
        **{"run.seed": seed, "run.output": where, "samples.every": 0},
    )
    train(config.changed(**{"run.eval_every": config.schedule.epochs}), resume=True)


def _load(entry: Entry, where: Path) -> Any:
    """The pipeline of an entry's training, or that of its ``weights`` with the entry's options."""
    from gspn.models import GSPNDenoiser2DModel
    from gspn.tasks.class_conditional import load_pipeline

    pipeline = load_pipeline(entry.weights or where)
    if entry.weights is not None:
        weights = pipeline.transformer.state_dict()
        options = {**pipeline.transformer.config, **entry.settings["model.options"]}
        pipeline.transformer = GSPNDenoiser2DModel.from_config(options).eval()
        pipeline.transformer.load_state_dict(weights)
    return pipeline


def _draw(pipeline: Any, drawing: Drawing, start: Path | None, seed: int, path: Path) -> None:
    """Draw images with Euler's steps and write them with their classes, as the ADM suite's archives have them."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from gspn._files import replaced
    from gspn.tasks.core.seeding import derived_seed

    size, strength = drawing.size, 1.0 if start is None else STRENGTH
    sigmas = torch.linspace(strength, 0, round(STEPS * strength) + 1)
    labels = torch.arange(drawing.number) % pipeline.num_classes
    nothing = torch.full_like(labels, pipeline.num_classes)
    earlier = None if start is None else torch.from_numpy(np.load(start)["arr_0"][: drawing.number, ..., 0])
    images = []
    for batch in torch.arange(drawing.number).split(50 * SIZE // size):
        # The noise of an image depends on the seed and its index alone, and is that of every entry.
        generators = [torch.Generator().manual_seed(derived_seed(seed, "sizes", size, int(i))) for i in batch]
        x = torch.stack([torch.randn(1, size, size, generator=generator) for generator in generators])
        if earlier is not None:
            clean = F.interpolate(earlier[batch, None].float() / 127.5 - 1, (size, size), mode="bicubic")
            x = (1 - sigmas[0]) * clean.clamp(-1, 1) + sigmas[0] * x
        both = torch.cat([labels[batch], nothing[batch]])
        with torch.inference_mode():
            for sigma, after in pairwise(sigmas):
                time = (1000 * sigma).expand(len(both))
                velocity = pipeline.transformer(torch.cat([x, x]), timestep=time, class_labels=both).sample.float()
                with_class, without = velocity.chunk(2)
                x = x + (after - sigma) * (without + GUIDANCE * (with_class - without))
        images.append(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1))
    pixels = torch.cat(images).permute(0, 2, 3, 1).contiguous().numpy()
    with replaced(path) as part, part.open("wb") as file:
        np.savez_compressed(file, arr_0=pixels, arr_1=labels.numpy())


def _enlarge(drawing: Drawing, path: Path) -> None:
    """Write held-out digits of a drawing's size and number, of all classes alike."""
    import numpy as np

    from gspn.tasks.diffusion.images import open_images

    digits = open_images("mnist5k:val", size=(drawing.size, drawing.size), limit=drawing.number)
    np.savez_compressed(path, arr_0=digits.pixels.permute(0, 2, 3, 1).numpy(), arr_1=np.asarray(digits.labels))


def _measure(path: Path, cache: Path) -> None:
    """Compare drawn images with the reference and write the figures beside them.

    One reference serves all sizes, because the feature model enlarges every image to its own 224 pixels.
    """
    from gspn._console import default_console
    from gspn.cli.class_conditional import load_classifier
    from gspn.tasks.diffusion.evaluation import compare_images
    from gspn.tasks.diffusion.images import open_images

    ours, theirs = open_images(path), open_images(REFERENCE, limit=REFERENCES)
    figures, _, _ = compare_images(ours, theirs, features="lite0", device="cpu", cache=cache, console=default_console())
    # The classifier reduces every image to its own 28 pixels.
    guesses = load_classifier(CLASSIFIER, device="cpu").classify([ours.to_pil(i) for i in range(len(ours))])
    figures["consistency"] = sum(a == b for a, b in zip(guesses, ours.labels, strict=True)) / len(ours)
    path.with_suffix(".json").write_text(json.dumps(figures))


def _rows(study: str, entry: Entry, seed: int, where: Path) -> Iterator[dict[str, Any]]:
    training = read_csv(where / "metrics.csv") if (where / "trained").exists() else []
    kept = ("sample_count", "reference_count", "features", "fid", "sfid", "kid", "kid_std", "precision", "recall")
    for name in STUDIES[study].drawings:
        path, drawing = _drawn(where, name).with_suffix(".json"), DRAWINGS[name]
        if not path.exists():
            continue
        figures = json.loads(path.read_text())
        yield {
            "study": study,
            "entry": entry.label,
            "settings": json.dumps(entry.settings),
            "form": entry.form or "",
            "weights": entry.weights or "",
            "seed": seed,
            "updates": int(training[-1]["step"]) if training else "",
            "held_out_loss": float(training[-1]["ema_loss"]) if training else "",
            "train_seconds": round(sum(float(epoch["seconds"]) for epoch in training), 1) if training else "",
            "drawing": name,
            "size": drawing.size,
            "steps": STEPS,
            "guidance": GUIDANCE,
            "strength": 1.0 if drawing.start is None else STRENGTH,
            **{key: figures[key] for key in (*kept, "consistency")},
        }


if __name__ == "__main__":
    app()

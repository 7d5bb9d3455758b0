"""``gspn class-conditional``: train class-conditional denoisers, sample images, and measure them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from gspn._console import Console
from gspn.tasks import class_conditional as task
from gspn.tasks.diffusion.schedulers import SCHEDULERS

from .app import App
from .messages import facts_table, failed, warn_broken, wrote
from .options import (
    MOST_IMAGES,
    BatchSize,
    Device,
    DeviceName,
    ImageData,
    OutputDirectory,
    Precision,
    PrecisionName,
    Results,
    Root,
    Size,
    Workers,
    output_directory,
    output_file,
    parse_size,
)
from .training import Flag, TrainingCommand, add_training_commands

if TYPE_CHECKING:
    from PIL.Image import Image

    from gspn.tasks.class_conditional import Evaluation
    from gspn.tasks.class_conditional.evaluation import Classifier

app = App(help="Train class-conditional denoisers, sample images, and measure them.")


def _done(result: Any) -> str:
    output = escape(str(result.output))
    return f"[dim]wrote[/] {output}/last; sample with [bold]gspn class-conditional sample {output}[/]"


add_training_commands(
    app,
    TrainingCommand(
        task.ClassConditionalConfig,
        lambda *args, **options: task.train(*args, **options),
        "Train a class-conditional denoiser of images or latents.",
        _done,
        {
            "model": Flag("model.name", "NAME", "Kind of model: gspn, attention (its twin) or dit."),
            "model_size": Flag("model.size", "SIZE", "Size of the model, such as B/2."),
            "latents": Flag("data.latents", "DIR", "Directory of latents from gspn class-conditional latents."),
        },
    ),
)


@app.command()
def latents(
    vae: Annotated[
        str, typer.Option(metavar="PATH|HUB_ID", help="An AutoencoderKL of diffusers, or a pipeline with one.")
    ],
    data: ImageData,
    output: OutputDirectory,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split of the data set.")] = "train",
    root: Root = None,
    size: Annotated[int, typer.Option(metavar="N", min=1, help="Height and width of the images in pixels.")] = 256,
    hflip: Annotated[bool, typer.Option("--hflip", help="Encode the mirrored images too.")] = False,
    batch_size: BatchSize = 32,
    shard_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images in one file.")] = 4096,
    precision: Precision = PrecisionName.fp32,
    device: Device = DeviceName.auto,
    workers: Workers = 4,
) -> None:
    """Encode a data set once, for gspn class-conditional train --latents.

    A stopped command continues after the last whole file when it is started again; files with a wrong checksum are
    encoded again. For several GPUs start it with torchrun: the processes share the files.
    """
    try:
        result = task.cache_latents(
            vae, data=data, output=output, split=split, root=root, size=size, hflip=hflip, batch_size=batch_size,
            shard_size=shard_size, precision=precision.value, device=device.value, workers=workers,
            console=Console(),
        )  # fmt: skip
    except KeyboardInterrupt:
        raise failed(f"interrupted; the same command continues with {output}", 130) from None
    if not result.is_main:
        return
    directory, index = escape(str(result.directory)), result.index
    wrote(
        f"{index.images:,} latents of {' x '.join(map(str, index.shape))} to {result.directory} in "
        f"{result.seconds:.1f} s ({result.made} of {len(index.shards)} files by this process)",
        f"; train with [bold]gspn class-conditional train --latents {directory}[/]",
    )


@app.command()
def sample(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="The directory of a run or pipeline, the name of a shipped model, or a hub id."
        ),
    ],
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", "-k", metavar="CLASS", help="Number or name of a class. Repeatable; default: all."),
    ] = None,
    number: Annotated[
        int | None,
        typer.Option(
            "--number", "-n", metavar="N", min=1, max=MOST_IMAGES, help="Number of images. Default: 8 of each class."
        ),
    ] = None,
    output: OutputDirectory = Path("samples"),
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the noise.")] = 0,
    guidance: Annotated[float, typer.Option(metavar="SCALE", min=0, help="Guidance scale; 1 disables it.")] = 2.0,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Number of denoising steps.")] = 50,
    scheduler: Annotated[str, typer.Option(metavar="NAME", help=f"Scheduler: auto, {', '.join(SCHEDULERS)}.")] = "auto",
    size: Size = None,
    batch_size: BatchSize = 64,
    precision: Precision = PrecisionName.fp32,
    device: Device = DeviceName.auto,
    grid: Annotated[bool, typer.Option(help="Write a grid of the first images too.")] = True,
) -> None:
    """Sample images of classes, each a PNG with its origin in it, and a grid of the first 400 at most.

    The same seed gives the same images for every batch size. For several GPUs start it with torchrun.
    """
    width, height = (None, None) if size is None else parse_size(size)
    result = task.sample(
        model, output=output, classes=classes, number=number, seed=seed, guidance=guidance, steps=steps,
        scheduler=scheduler, height=height, width=width, batch_size=batch_size, precision=precision.value,
        device=device.value, grid=grid, console=Console(),
    )  # fmt: skip
    if result.is_main:
        grid_file = f"; a grid: {result.grid}" if result.grid else ""
        wrote(f"{len(result.records)} images to {result.directory} in {result.seconds:.1f} s{grid_file}")


@app.command()
def evaluate(
    samples: Annotated[
        str,
        typer.Argument(metavar="SAMPLES", help="A folder of images, an .npz file, or a data set such as mnist5k:val."),
    ],
    reference: Annotated[
        str, typer.Option("--reference", "-r", metavar="IMAGES", help="Reference images, in the same form as SAMPLES.")
    ],
    features: Annotated[
        str, typer.Option(metavar="NAME", help="Model of the features: auto, lite0 or inception.")
    ] = "auto",
    classifier: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Model of gspn classify, to count the samples that are of their class."),
    ] = None,
    output: Results = None,
    neighbours: Annotated[
        Path | None,
        output_file(metavar="PNG", help="Image to write: samples beside their nearest references."),
    ] = None,
    export: Annotated[
        Path | None,
        output_file(metavar="NPZ", help="File to write: the samples for the ADM evaluation suite."),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=4, help="Most images of each set to use.")] = None,
    batch_size: BatchSize = 64,
    cache: Annotated[Path, output_directory("Directory that keeps the features of the reference.", "--cache")] = Path(
        "runs/features"
    ),
    device: Device = DeviceName.auto,
) -> None:
    """Measure FID, KID, sFID, inception score, precision and recall of generated images.

    The figures compare only with figures of the same feature model, which is printed with them.
    """
    from gspn.tasks.core.devices import distributed_context, is_main_process
    from gspn.tasks.diffusion.images import export_npz, open_images

    console = Console()
    with distributed_context():
        result = task.evaluate(
            samples, reference, features=features,
            classifier=None if classifier is None else load_classifier(classifier, batch_size, device.value),
            neighbours=neighbours, limit=limit, batch_size=batch_size, device=device.value, cache=cache,
            console=console,
        )  # fmt: skip
    if not is_main_process():
        return
    console.print(facts_table(_facts(result)))
    warn_broken(result.broken)
    table = None if output is None else output / "evaluation.json"
    if table is not None:
        result.write_json(table)
    if export is not None:
        export_npz(open_images(samples, limit=limit), export)
    for path in (table, neighbours, export):
        if path is not None:
            wrote(path)


def load_classifier(name: str, batch_size: int = 64, device: Literal["auto", "cpu"] = "auto") -> Classifier:
    """A model of ``gspn classify``, as the evaluation takes it."""
    from gspn.tasks.class_conditional.evaluation import Classifier
    from gspn.tasks.classify import predict
    from gspn.tasks.classify.model import label_names, load_model

    model = load_model(name)

    def classify(images: Sequence[Image]) -> list[int]:
        return [one.indices[0] for one in predict(images, model, top=1, batch_size=batch_size, device=device)]

    return Classifier(name, classify, label_names(model))


def _facts(result: Evaluation) -> dict[str, str]:
    facts = {
        "samples": f"{result.samples}, {result.sample_count:,} of {result.width} x {result.height}",
        "reference": f"{result.reference}, {result.reference_count:,}",
        "features": result.features,
        "FID": f"{result.fid:.3f}",
        "sFID": f"{result.sfid:.3f}",
        "KID x 1000": f"{1000 * result.kid:.3f} ± {1000 * result.kid_std:.3f}",
        "inception score": f"{result.inception_score:.3f} ± {result.inception_score_std:.3f}",
        "precision, recall": f"{result.precision:.3f}, {result.recall:.3f}",
    }
    if result.consistency is not None and result.per_class:
        worst = sorted(result.per_class.items(), key=lambda one: one[1])[:3]
        weakest = ", ".join(f"{name} {value:.1%}" for name, value in worst)
        facts["of their class"] = f"{result.consistency:.1%} by {result.classifier}; least: {weakest}"
    return facts

"""``gspn t2i evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from gspn._console import Console

from ..messages import wrote
from ..options import BatchSize, Device, DeviceName, Results, Root


def evaluate(
    samples: Annotated[
        list[Path], typer.Argument(metavar="SAMPLES...", help="Directories that gspn t2i sample wrote.")
    ],
    reference: Annotated[
        str, typer.Option("--reference", "-r", metavar="NAME:SPLIT", help="Reference images, with captions.")
    ] = "emoji:train",
    root: Root = None,
    size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Height and width of the comparison in pixels. Default: the samples'."),
    ] = None,
    distractors: Annotated[
        str | None,
        typer.Option(metavar="SPLIT", help="Split of the reference's data set whose captions join the ranking."),
    ] = None,
    features: Annotated[
        str, typer.Option(metavar="NAME", help="Model of the features: auto, lite0 or inception.")
    ] = "auto",
    batch_size: BatchSize = 64,
    device: Device = DeviceName.auto,
    output: Results = None,
) -> None:
    """Measure generated images: FID and KID against a reference, and how well they fit their prompts.

    The text score is the cosine between an image's features and those that its prompt predicts, by a ridge regression
    from sentences to features that is fitted on the reference. The rank is the median rank of an image's own prompt
    among all prompts of the set. For several GPUs start it with torchrun: the processes share the images.
    """
    from gspn.tasks.core.devices import distributed_context, is_main_process
    from gspn.tasks.text_to_image.evaluate import evaluate as run

    console, results = Console(), []
    with distributed_context():
        for directory in samples:
            result = run(
                directory, reference, root=root, size=size, distractors=distractors, features=features,
                batch_size=batch_size, device=device.value, console=console,
            )  # fmt: skip
            results.append(result)
            if output is not None and is_main_process():
                path = output / f"{directory.name}.json"
                result.write_json(path)
                wrote(path)
    if not is_main_process():
        return
    table = Table("", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("images", "FID", "KID x 1000", "IS", "precision", "recall", "text score", "rank", "top 1"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            escape(Path(result.samples).name), str(result.sample_count), f"{result.fid:.2f}",
            f"{1000 * result.kid:.2f}", f"{result.inception_score:.2f}", f"{result.precision:.2f}",
            f"{result.recall:.2f}", f"{result.text.similarity:.3f}",
            f"{result.text.rank:g} of {result.text.candidates}", f"{100 * result.text.top1:.0f} %",
        )  # fmt: skip
    real = results[0].real
    if real is not None:
        table.add_row(
            "[dim]real images of the same prompts[/]", *[""] * 6, f"{real.similarity:.3f}",
            f"{real.rank:g} of {real.candidates}", f"{100 * real.top1:.0f} %",
        )  # fmt: skip
    console.print(table)
    console.print(f"[dim]{escape(results[0].features)}; reference {escape(reference)}[/]", highlight=False)

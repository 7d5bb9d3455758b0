"""``gspn t2i evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import one_line_errors
from ..options import Device, DeviceName


def evaluate(
    samples: Annotated[
        list[Path], typer.Argument(metavar="SAMPLES...", help="Directories that gspn t2i sample wrote.")
    ],
    reference: Annotated[
        str, typer.Option(metavar="NAME:SPLIT", help="Images with captions that samples are to be like.")
    ] = "emoji:train",
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the reference lies.")] = None,
    size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Height and width to compare at; default: the samples'.")
    ] = None,
    distractors: Annotated[
        str | None,
        typer.Option(metavar="SPLIT", help="Of the reference's data, whose captions are candidates as well."),
    ] = None,
    features: Annotated[str, typer.Option(metavar="NAME", help="auto, lite0, inception.")] = "auto",
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images at a time.")] = 64,
    device: Device = DeviceName.auto,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="For the figures, as JSON by the samples' names."),
    ] = None,
) -> None:
    """Measure generated images: FID and KID against a reference, and how well they fit their prompts.

    The text score is the cosine between an image's features and those that its prompt predicts, by a ridge regression
    from sentences to features that is fitted on the reference; the rank is the median place of an image's own prompt
    among all of the set.
    """
    with one_line_errors():
        from gspn.tasks.text_to_image.evaluate import evaluate as run

        console = Console()
        rows = []
        for one in samples:
            found = run(
                one,
                reference,
                root=root,
                size=size,
                distractors=distractors,
                features=features,
                batch_size=batch_size,
                device=device.value,
                console=console,
            )
            rows.append(found)
            if output is not None:
                found.write_json(output / f"{one.name}.json")
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        for heading in (
            "",
            "images",
            "FID",
            "KID x 1000",
            "IS",
            "precision",
            "recall",
            "text score",
            "rank",
            "top 1",
        ):
            table.add_column(heading, justify="left" if not heading else "right")
        for found in rows:
            table.add_row(
                escape(Path(found.samples).name),
                str(found.sample_count),
                f"{found.fid:.2f}",
                f"{1000 * found.kid:.2f}",
                f"{found.inception_score:.2f}",
                f"{found.precision:.2f}",
                f"{found.recall:.2f}",
                f"{found.text.similarity:.3f}",
                f"{found.text.rank:g} of {found.text.candidates}",
                f"{100 * found.text.top1:.0f} %",
            )
        real = rows[0].real
        if real is not None:
            table.add_row(
                "[dim]real images of the same prompts[/]", *[""] * 6, f"{real.similarity:.3f}",
                f"{real.rank:g} of {real.candidates}", f"{100 * real.top1:.0f} %",
            )  # fmt: skip
        console.print(table)
        console.print(f"[dim]{escape(rows[0].features)}; reference {escape(reference)}[/]", highlight=False)

"""``gspn class-conditional evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import one_line_errors, warn
from ..options import Device, DeviceName

if TYPE_CHECKING:
    from PIL.Image import Image

    from gspn.tasks.class_conditional import Evaluation
    from gspn.tasks.class_conditional.evaluation import Classifier


def evaluate(
    samples: Annotated[
        str, typer.Argument(metavar="SAMPLES", help="A folder of images, an .npz, or a data set as mnist5k:val.")
    ],
    reference: Annotated[str, typer.Option("--reference", "-r", metavar="IMAGES", help="Likewise: what is real.")],
    features: Annotated[str, typer.Option(metavar="NAME", help="auto, lite0 or inception.")] = "auto",
    classifier: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A model of gspn classify, for whether samples are of their class."),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", dir_okay=False, help="Everything, also per class.")
    ] = None,
    neighbours: Annotated[
        Path | None,
        typer.Option(metavar="PNG", dir_okay=False, help="Samples beside the nearest images of the reference."),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="NPZ", dir_okay=False, help="The samples for the ADM evaluation suite.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=4, help="At most so many of each set.")] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images at a time.")] = 64,
    cache: Annotated[Path, typer.Option(metavar="DIR", help="Keeps the reference's features.")] = Path("runs/features"),
    device: Device = DeviceName.auto,
) -> None:
    """FID, KID, sFID, inception score, precision and recall of generated images.

    The features' network is stated with the figures: they compare only with figures of the same network.
    """
    with one_line_errors():
        from gspn.tasks.class_conditional import evaluate as run
        from gspn.tasks.diffusion.images import export_npz, open_images

        console = Console()
        found = run(
            samples,
            reference,
            features=features,
            classifier=None if classifier is None else load_classifier(classifier, batch_size, device),
            neighbours=neighbours,
            limit=limit,
            batch_size=batch_size,
            device=device.value,
            cache=cache,
            console=console,
        )
        console.print(_table(found))
        for name in found.broken:
            warn(f"{name} could not be read and does not count")
        if json_path is not None:
            found.write_json(json_path)
        if export is not None:
            export_npz(open_images(samples, limit=limit), export)
        for path in (json_path, neighbours, export):
            if path is not None:
                console.print(f"[dim]wrote[/] {escape(str(path))}", highlight=False, soft_wrap=True)


def load_classifier(name: str, batch_size: int = 64, device: DeviceName = DeviceName.auto) -> Classifier:
    """A model of ``gspn classify``, as the evaluation takes it."""
    from gspn.tasks.class_conditional.evaluation import Classifier
    from gspn.tasks.classify import predict
    from gspn.tasks.classify.model import label_names, load_model

    model = load_model(name)

    def classify(images: Sequence[Image]) -> list[int]:
        return [one.indices[0] for one in predict(images, model, top=1, batch_size=batch_size, device=device.value)]

    return Classifier(name, classify, label_names(model))


def _table(found: Evaluation) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    size = f"{found.height} x {found.width}"
    table.add_row("samples", escape(f"{found.samples}, {found.sample_count:,} of {size}"))
    table.add_row("reference", escape(f"{found.reference}, {found.reference_count:,}"))
    table.add_row("features", found.features)
    table.add_row("FID", f"{found.fid:.3f}")
    table.add_row("sFID", f"{found.sfid:.3f}")
    table.add_row("KID x 1000", f"{1000 * found.kid:.3f} ± {1000 * found.kid_std:.3f}")
    table.add_row("inception score", f"{found.inception_score:.3f} ± {found.inception_score_std:.3f}")
    table.add_row("precision, recall", f"{found.precision:.3f}, {found.recall:.3f}")
    if found.consistency is not None and found.per_class:
        worst = sorted(found.per_class.items(), key=lambda one: one[1])[:3]
        weakest = ", ".join(f"{name} {value:.1%}" for name, value in worst)
        table.add_row("of their class", escape(f"{found.consistency:.1%} by {found.classifier}; least: {weakest}"))
    return table

"""``gspn export``: models as files of ONNX or of ``torch.export``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from gspn._console import Console
from gspn._errors import UsageError, require
from gspn._files import printable

from .messages import facts_table, wrote
from .options import parse_size, writable


class Format(StrEnum):
    """The format of an exported model."""

    onnx = "onnx"
    pt2 = "pt2"


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Name of a model, the directory of a run, a folder that timm saved, or hf-hub:ID."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", callback=writable, help="File to write; its name ends as the format."
        ),
    ],
    format_: Annotated[
        Format | None,
        typer.Option(
            "--format", help="onnx, verified in ONNX Runtime, or pt2 of torch.export. Default: FILE's ending."
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHxHEIGHT", help="Size of the images, such as 640x480, or one number. Default: the model's own."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, max=4096, help="Number of images of the example.")] = 1,
    dynamic: Annotated[
        bool, typer.Option("--dynamic/--static", help="Take any batch, height and width later, or just the example's.")
    ] = True,
    opset: Annotated[
        int | None, typer.Option(metavar="N", help="Version of ONNX's operators, 18 to 23. Default: 20.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of random weights, if none are pretrained.")] = 0,
) -> None:
    """Export a model for other runtimes.

    The input is ``x``, images ``[batch, 3, height, width]`` normalized as in training, and the output is ``output``,
    the logits. Before the file appears it has been run, and gives what the model gives.
    """
    ending = output.suffix.removeprefix(".")
    format_name = ending if format_ is None else format_.value
    if format_name not in set(Format) or ending != format_name:
        endings = "onnx or .pt2" if format_ is None else format_name
        raise UsageError(f"--output {printable(output)!r}: the file's name has to end in .{endings}.")
    if opset is not None and format_name != Format.onnx:
        raise UsageError(f"--opset {opset}: a .pt2 file has no opset; leave it out.")
    require("timm")
    if format_name == Format.onnx:
        require("onnx", "onnxscript", "onnxruntime", extra="export")
    import torch

    from gspn.analysis.loading import load_model
    from gspn.export import to_onnx, to_pt2
    from gspn.export.onnx_file import OPSET

    opened = load_model(model, seed=seed)
    channels, height, width = opened.input_size
    if size is not None:
        width, height = parse_size(size)
    images = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))
    facts = {"model": opened.name, "weights": opened.weights}
    with Console(stderr=True).status(escape(f"exporting {opened.name}")):
        if format_name == Format.onnx:
            version = OPSET if opset is None else opset
            program = to_onnx(opened.model, images, output, dynamic=dynamic, opset=version)
            nodes = [node.op_type for node in program.model.graph]
            facts["opset"] = str(program.model.opset_imports[""])
            facts["nodes"] = f"{len(nodes)}, of which {nodes.count('Scan')} are scans"
        else:
            to_pt2(opened.model, images, output, dynamic=dynamic)
    shape = ("batch", channels, "height", "width") if dynamic else tuple(images.shape)
    facts["input"] = f"x [{', '.join(map(str, shape))}]"
    facts["verified"] = f"with {batch} x {channels} x {height} x {width}" + (", and at another size" if dynamic else "")
    Console().print(facts_table(facts))
    wrote(output)

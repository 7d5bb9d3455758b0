"""``gspn convert``: the authors' classifiers as models of timm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gspn._console import Console
from gspn._errors import UsageError, require
from gspn._files import printable, replaced_directory, write_text

from .messages import facts_table, wrote
from .options import BatchSize, Device, DeviceName, Workers, output_directory

if TYPE_CHECKING:
    from gspn.models.official_checkpoint import OfficialCheckpoint

_CARD: dict[str, Any] = {
    "license": "other",
    "license_name": "non-commercial",
    "description": "A GSPN classifier (arXiv 2501.12381), trained by the authors and converted by `gspn convert`. "
    "Names and layout of the weights changed, their values did not. **The weights are under the authors' licence, "
    "which excludes commercial use.** They need the package gspn.",
    "details": {"Paper": "https://arxiv.org/abs/2501.12381", "Dataset": "imagenet-1k"},
}


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A file, .pth or .safetensors, or OWNER/NAME/FILE on the hub.")
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME", help="The model: gspn_tiny, gspn_small or gspn_base.")
    ],
    output: Annotated[Path, output_directory("Directory to write config.json, model.safetensors and a card to.")],
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="ROOT", file_okay=False, help="Directory of ImageNet, with a folder val, to measure accuracy on."
        ),
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Repository of the Hugging Face hub to upload to.")
    ] = None,
    batch_size: BatchSize = 64,
    workers: Workers = 4,
    device: Device = DeviceName.auto,
) -> None:
    """Convert a checkpoint of the authors into a model that timm loads.

    The directory loads with ``timm.create_model("local-dir:DIR", pretrained=True)`` and with every command of ``gspn
    classify``. Weights that do not fit the model exactly are refused.
    """
    require("timm", "safetensors")
    import gspn.models  # noqa: F401  (registers the models)
    from gspn.models.official_checkpoint import PUBLISHED, official_model, read_official

    if model not in PUBLISHED:
        raise UsageError(f"--model is {model!r}; official weights exist for {', '.join(PUBLISHED)}.")
    if output.is_dir() and any(output.iterdir()):
        raise UsageError(f"--output {printable(output)} has files; name a directory that is empty or does not exist.")
    checkpoint = read_official(_find(source))
    converted = official_model(model, checkpoint)
    card = {**_CARD, "usage": _usage(push or f"local-dir:{output}")}
    _write(output, converted, card)
    console = Console()
    console.print(facts_table(_facts(source, checkpoint)))
    wrote(output)
    if check is not None:
        from gspn.tasks.classify import evaluate

        result = evaluate(
            output, data="folder", root=check, batch_size=batch_size, workers=workers, device=device.value,
            console=console,
        )  # fmt: skip
        top1 = f"{result.top1:.2f} % of {result.images:,} images; published: {PUBLISHED[model]:.1f} %"
        console.print(facts_table({"top-1": top1}))
    if push is not None:
        from timm.models import push_to_hf_hub

        # The hub's own library refuses a wrong name or a missing login.
        with _hub_errors(push):
            push_to_hf_hub(converted, push, model_card=card, safe_serialization=True)
        wrote(f"https://huggingface.co/{push}")


def _find(source: str) -> Path:
    """The file of a source; one on the hub is downloaded to the hub's own cache."""
    path = Path(source)
    if path.exists():
        return path
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name and file) or source.startswith(("/", ".")):
        raise UsageError(
            f"{printable(source)!r} does not exist; name a file, or one on the hub as OWNER/NAME/FILE, such as "
            "whj363636/GSPN/tiny.pth."
        )
    hub = require("huggingface_hub")
    from gspn.models.saved import hub_or_cache

    with _hub_errors(source), hub_or_cache():
        return Path(hub.hf_hub_download(f"{owner}/{name}", file))


def _hub_errors(name: str) -> Any:
    from gspn.models.saved import refusing

    return refusing(name, (OSError, ValueError))


def _write(output: Path, model: Any, card: dict[str, Any]) -> None:
    from timm.models import save_for_hf

    hub: Any = require("timm.models._hub")
    with replaced_directory(output) as part:
        save_for_hf(model, str(part), safe_serialization=True)
        write_text(part / "README.md", hub.generate_readme(card, output.name))


def _usage(name: str) -> str:
    name = name if ":" in name else f"hf-hub:{name}"
    return (
        "```python\nimport gspn.models\nimport timm\n\n"
        f'model = timm.create_model("{name}", pretrained=True).eval()\n```\n'
    )


def _facts(source: str, checkpoint: OfficialCheckpoint) -> dict[str, str]:
    weights = checkpoint.weights
    facts = {
        "source": printable(source),
        "weights": f"{sum(one.numel() for one in weights.values()) / 1e6:.2f} M in {len(weights)} tensors, "
        f"{checkpoint.num_classes} classes" + (f", from {checkpoint.wrapper!r}" if checkpoint.wrapper else ""),
        **{f"its {name}": value for name, value in checkpoint.facts.items()},
    }
    if checkpoint.left_out:
        facts["left out"] = ", ".join(checkpoint.left_out)
    return facts

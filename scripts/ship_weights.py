r"""Convert a training run to weights of the package: float16 safetensors and a model card.

    python scripts/ship_weights.py runs/mnist5k_pico gspn_pico.mnist5k --commit $(git rev-parse --short HEAD) \
        --command "gspn classify train --config mnist5k_pico"

The card states the command, the seed, the versions and the accuracy of the shipped file, not that of the run.
"""

from __future__ import annotations

import csv
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
import yaml
from safetensors.torch import load_file, save_file

import gspn
import gspn.models
from gspn.tasks.classify import evaluate

WEIGHTS = Path(gspn.models.__file__).parent / "weights"
MOST_BYTES = 8_000_000


def main(
    run: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Directory of a finished training run.")],
    name: Annotated[str, typer.Argument(help="Model and tag, such as gspn_pico.mnist5k.")],
    command: Annotated[str, typer.Option(help="The command of the run, for the card.")],
    commit: Annotated[str, typer.Option(help="The commit of the run, for the card.")],
) -> None:
    """Write ``NAME.safetensors`` and ``NAME.md`` into the package and evaluate them."""
    state = {key: value.half() for key, value in load_file(run / "last" / "model.safetensors").items()}
    target = WEIGHTS / f"{name}.safetensors"
    WEIGHTS.mkdir(exist_ok=True)
    save_file(state, target, metadata={"format": "pt", "model": name})
    target.chmod(0o644)  # safetensors writes files that only their owner can read
    size = target.stat().st_size
    if size > MOST_BYTES:
        raise typer.BadParameter(f"{target} has {size} bytes, more than the {MOST_BYTES} bytes allowed in the package.")

    config = yaml.safe_load((run / "config.yaml").read_text())
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    model = timm.create_model(
        name.partition(".")[0],
        pretrained=True,
        num_classes=config["resolved"]["num_classes"],
        pretrained_cfg_overlay=dict(
            file=str(target),
            num_classes=config["resolved"]["num_classes"],
            input_size=tuple(config["resolved"]["input_size"]),
            mean=tuple(config["resolved"]["mean"]),
            std=tuple(config["resolved"]["std"]),
            crop_pct=config["resolved"]["crop_pct"],
            interpolation=config["resolved"]["interpolation"],
        ),
    ).eval()
    result = evaluate(model, data=config["data"]["name"])
    baseline = max(sum(row) for row in result.confusion) / result.images
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "timm", "accelerate"))
    minutes = sum(float(row["seconds"]) for row in rows) / 60
    card = f"""# {name}

{result.parameters:,} parameters, {config["resolved"]["input_size"][-1]} px, {len(result.classes)} classes:
{", ".join(result.classes)}.

| data | split | images | top-1 | most frequent class |
|---|---|---|---|---|
| {result.data} | {result.split} | {result.images} | **{result.top1:.2f} %** | {baseline:.1%} |

Measured with the shipped float16 file (`{target.name}`, {size / 1e6:.1f} MB), computed in float32. The weights are the
exponential moving average (EMA) after the last epoch of training: they were not chosen by a result on this split.

Command of the training from scratch:

```
{command}
```

Seed {config["run"]["seed"]}, {len(rows)} epochs, {minutes:.0f} minutes on one busy CPU thread. gspn {gspn.__version__} at {commit},
{versions}, Python {platform.python_version()}.

Use:

```python
import timm
import gspn.models

model = timm.create_model("{name}", pretrained=True).eval()
```

Use it to try the library, or as a start for fine-tuning. It was trained on no other data, so it classifies only images
like those of this data set.
"""  # noqa: E501  # lines of the card
    (WEIGHTS / f"{name}.md").write_text(card)
    typer.echo(f"{target}: {size} bytes, top-1 {result.top1:.2f} %")


if __name__ == "__main__":
    torch.set_num_threads(2)
    typer.run(main)

"""Turn a training run into weights of the package: float16 safetensors and a model card.

    python scripts/ship_weights.py runs/mnist5k_pico gspn_pico.mnist5k

The card states the command, seed, versions and what the shipped file, not the run, scores.
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
    command: Annotated[str, typer.Option(help="What made the run, for the card.")],
    commit: Annotated[str, typer.Option(help="The commit that made it.")],
) -> None:
    """Write ``NAME.safetensors`` and ``NAME.md`` into the package and evaluate them."""
    state = {key: value.half() for key, value in load_file(run / "last" / "model.safetensors").items()}
    target = WEIGHTS / f"{name}.safetensors"
    WEIGHTS.mkdir(exist_ok=True)
    save_file(state, target, metadata={"format": "pt", "model": name})
    target.chmod(0o644)  # safetensors writes files that only their owner reads
    size = target.stat().st_size
    if size > MOST_BYTES:
        raise typer.BadParameter(f"{target} has {size} bytes, more than the {MOST_BYTES} that the package takes.")

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

Measured with the shipped float16 file (`{target.name}`, {size / 1e6:.1f} MB), computing in float32. The weights are the
average kept by the training run (EMA) as it was after the last epoch: the split had no part in choosing them.

Trained from scratch by

```
{command}
```

with seed {config["run"]["seed"]}, {len(rows)} epochs, {minutes:.0f} minutes on one busy CPU thread; gspn {gspn.__version__} at {commit},
{versions}, Python {platform.python_version()}.

Use:

```python
import timm
import gspn.models

model = timm.create_model("{name}", pretrained=True).eval()
```

For images like those of the data set, to try the library with and as a start for fine-tuning: it has seen nothing
else.
"""  # noqa: E501  # lines of the card
    (WEIGHTS / f"{name}.md").write_text(card)
    typer.echo(f"{target}: {size} bytes, top-1 {result.top1:.2f} %")


if __name__ == "__main__":
    torch.set_num_threads(2)
    typer.run(main)

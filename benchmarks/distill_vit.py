"""A small ViT trained on emoji and distilled into GSPN in two stages, beside students with other latent widths, with
one attention kept, and trained on the labels from nothing; a further stage at twice the size; and speed and memory at
larger sizes.

    python benchmarks/distill_vit.py run [--entry LABEL]... [--seed N]...
    python benchmarks/distill_vit.py speed
    python benchmarks/distill_vit.py table

A run is a ``gspn classify train`` or a ``gspn distill train`` in a process of its own with one thread. A run that ended
is not repeated, and one that was stopped continues.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from common import (
    Csv,
    Jobs,
    Root,
    Step,
    directory,
    print_table,
    read_csv,
    run_all,
    settings,
    spread,
    write_csv,
)

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")

_ROOT = Path("runs/distill_vit")
SIZE, DEPTH = 48, 9
VIT = {"img_size": SIZE, "patch_size": 8, "embed_dim": 96, "depth": DEPTH, "num_heads": 3}
NAME = "vit_tiny_patch16_224"
TEACHER_EPOCHS, EPOCHS, BLOCK_EPOCHS, LARGER_EPOCHS = 30, 8, 4, 4
SEEDS = (0, 1)


@dataclass(frozen=True)
class Entry:
    """A student: its latent width, blocks that keep their attention, and whether it learns from a teacher.

    Without a latent width and a teacher it keeps all attentions: the teacher, trained further on the labels.
    """

    label: str
    latent_dim: int | None
    keep: tuple[int, ...] = ()
    distilled: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    def step(self, root: Path, seed: int) -> Step:
        """The training of a seed."""
        where = directory(root, "students", self.label, seed)
        if not self.distilled and self.latent_dim is None:
            trained = {"model.name": f"local-dir:{_teacher(root).directory / 'best'}", "model.pretrained": True,
                       "schedule.epochs": EPOCHS, "schedule.warmup_epochs": 1, "run.seed": seed}  # fmt: skip
            return _classifier(where, **trained)
        if not self.distilled:
            arguments = ["scratch", "--latent-dim", str(self.latent_dim), "--output", str(where), "--seed", str(seed)]
            return Step(arguments, where, resumes=True, script=__file__)
        values = {
            "schedule.epochs": EPOCHS, "distillation.block_epochs": BLOCK_EPOCHS, "model.latent_dim": self.latent_dim,
            "model.keep_attention": list(self.keep), "run.eval_every": 4, "run.trackers": [], "run.seed": seed,
            **self.settings,
        }  # fmt: skip
        teacher = str(_teacher(root).directory)
        arguments = ["distill", "train", "--config", "emoji_vit", "--teacher", teacher, "--output", str(where)]
        return Step([*arguments, *settings(values)], where, resumes=True)


ENTRIES = (
    Entry("latent 64", 64),
    Entry("trained from nothing", 64, distilled=False),
    Entry("latent 64, 1 of 9 attentions kept", 64, (DEPTH // 2,)),
    Entry("latent 16", 16),
    Entry("all 96 channels", None),
    Entry("latent 64, end to end alone", 64, settings={"distillation.block_epochs": 0}),
    Entry("teacher, trained further on the labels", None, distilled=False),
)


def _teacher(root: Path) -> Step:
    values = {"model.name": NAME, "model.kwargs": VIT, "schedule.epochs": TEACHER_EPOCHS, "schedule.warmup_epochs": 2}
    return _classifier(root / "teacher", **values, **{"run.eval_every": 5, "run.seed": 0})


def _classifier(where: Path, **values: Any) -> Step:
    values = {"run.eval_every": 4, **values, "data.size": SIZE, "model.drop_path": 0.05, "run.trackers": []}
    return Step(
        ["classify", "train", "--config", "emoji_nano", "--output", str(where), *settings(values)], where, resumes=True
    )


def _larger(root: Path, seed: int) -> list[Step]:
    """The stage at twice the size, in which the first entry's student teaches itself, and the test of it."""
    former, where = ENTRIES[0].step(root, seed).directory, directory(root, "larger", ENTRIES[0].label, seed)
    values = {
        "data.size": 2 * SIZE, "distillation.teacher_size": SIZE, "distillation.block_epochs": 0,
        "schedule.epochs": LARGER_EPOCHS, "model.init_from": str(former), "run.trackers": [], "run.seed": seed,
        "run.eval_every": LARGER_EPOCHS,
    }  # fmt: skip
    arguments = ["distill", "train", "--config", "emoji_vit", "--teacher", str(former), "--output", str(where)]
    test = Step(["evaluate-larger", "--root", str(root), "--seed", str(seed)], where / "tests", script=__file__)
    return [Step([*arguments, *settings(values)], where, resumes=True), test]


@app.command()
def run(
    root: Root = _ROOT,
    jobs: Jobs = 1,
    entries: Annotated[list[str] | None, typer.Option("--entry", help="Label. Repeatable; default: all.")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Repeatable; default: 0, 1.")] = None,
) -> None:
    """Train the teacher, then the students, and the first entry's at the larger size."""
    _teacher(root).run()
    chosen = [one for one in ENTRIES if entries is None or one.label in entries]
    chains = [
        [entry.step(root, seed), *(_larger(root, seed) if entry is ENTRIES[0] else ())]
        for seed in seeds or SEEDS
        for entry in chosen
    ]
    run_all(chains, jobs)


@app.command(hidden=True)
def evaluate_larger(root: Root = _ROOT, seed: Annotated[int, typer.Option()] = 0) -> None:
    """The accuracy of the teacher, of the former student and of the new one, at both sizes."""
    from gspn.tasks.classify import evaluate
    from gspn.tasks.classify.model import load_model
    from gspn.tasks.distill import load_student
    from gspn.tasks.distill.student import resize

    def teacher(size: int) -> Any:
        model = load_model(_teacher(root).directory)
        resize(model, size)
        return model

    former, (new, test) = ENTRIES[0].step(root, seed).directory, _larger(root, seed)
    models = {
        "teacher, positions interpolated": teacher,
        f"{ENTRIES[0].label}, distilled at {SIZE} px": lambda size: load_student(former, size=size),
        f"{ENTRIES[0].label}, then at {2 * SIZE} px": lambda size: load_student(new.directory, size=size),
    }
    test.directory.mkdir(exist_ok=True)
    write_csv(test.directory / "top1.csv", [
        {"entry": label, "seed": seed, "size": size,
         "top1": f"{evaluate(build(size), data='emoji', batch_size=16, device='cpu').top1:.4f}"}
        for label, build in models.items()
        for size in (SIZE, 2 * SIZE)
    ])  # fmt: skip


@app.command(hidden=True)
def scratch(
    latent_dim: Annotated[int, typer.Option()],
    output: Annotated[Path, typer.Option()],
    seed: Annotated[int, typer.Option()] = 0,
    resume: Annotated[bool, typer.Option("--resume")] = False,
) -> None:
    """Train a ViT with GSPN in the place of all attentions from random weights, on the labels."""
    import timm
    from timm.models import register_model

    from gspn.tasks.classify import TrainConfig, train
    from gspn.timm import GSPNAdapter

    @register_model
    def emoji_vit_gspn(pretrained: bool = False, **kwargs: Any) -> Any:
        model = timm.create_model(NAME, pretrained=pretrained, **{**VIT, **kwargs})
        GSPNAdapter.from_model(model, latent_dim=latent_dim).mount(model)
        return model

    config = TrainConfig.load("emoji_nano").changed(**{
        "model.name": "emoji_vit_gspn", "data.size": SIZE, "model.drop_path": 0.05, "schedule.epochs": EPOCHS,
        "schedule.warmup_epochs": 1, "run.eval_every": 4, "run.trackers": [], "run.seed": seed, "run.output": output,
    })  # fmt: skip
    train(config, resume=resume)


@app.command()
def table(
    root: Root = _ROOT,
    output: Csv = None,
    larger: Annotated[Path | None, typer.Option(metavar="CSV", help="Table of the larger size to write.")] = None,
) -> None:
    """The accuracy of the teacher and the students, and at the larger size."""
    rows = []
    teacher = _teacher(root)
    if teacher.done:
        tests = [row for row in read_csv(teacher.directory / "metrics.csv") if row["top1"]]
        best = max(max(float(row["top1"]), float(row["ema_top1"])) for row in tests)  # best/ holds these weights
        rows.append({"entry": "teacher, all attentions", "seed": 0, "epochs": tests[-1]["epoch"], "top1": best})
    for entry in ENTRIES:
        for seed in SEEDS:
            step = entry.step(root, seed)
            if not step.done:
                continue
            metrics = read_csv(step.directory / "metrics.csv")
            last = metrics[-1]
            row = {"entry": entry.label, "seed": seed, "epochs": last["epoch"]}
            if entry.distilled:
                first = next((one for one in metrics if int(one["epoch"]) == BLOCK_EPOCHS), None)
                if first is not None and not entry.settings:
                    row |= {"stage_one_top1": first["top1"], "stage_one_agreement": first["agreement"]}
                row |= {key: last[key] for key in ("top1", "agreement", "eval_propagation", "eval_features")}
            else:
                row["top1"] = max(float(last["top1"]), float(last["ema_top1"]))
            rows.append({**row, "seconds": f"{sum(float(one['seconds']) for one in metrics):.0f}"})
    columns = ("stage_one_top1", "top1", "stage_one_agreement", "agreement", "eval_features")
    labels = list(dict.fromkeys(row["entry"] for row in rows))

    def cell(label: str, column: str) -> str:
        values = [float(row[column]) for row in rows if row["entry"] == label and row.get(column)]
        return spread(values, 3 if column.startswith("eval") else 1) if values else ""

    print_table(
        "emoji, 48 px", ["student", *columns], [[label, *(cell(label, one) for one in columns)] for label in labels]
    )
    write_csv(output, rows)
    tests = [test for seed in SEEDS for test in _larger(root, seed)[1:] if test.done]
    sizes = [row for test in tests for row in read_csv(test.directory / "top1.csv")]
    both = (str(SIZE), str(2 * SIZE))

    def at(label: str, size: str) -> str:
        found = (float(row["top1"]) for row in sizes if (row["entry"], row["size"]) == (label, size))
        return spread(found, 1)

    if sizes:
        shown = [[label, *(at(label, size) for size in both)] for label in dict.fromkeys(row["entry"] for row in sizes)]
        print_table("emoji, top-1 by size", ["model", *both], shown)
        write_csv(larger, sizes)


@app.command()
def speed(repeats: Annotated[int, typer.Option(min=1, help="Fewest samples of each.")] = 5, output: Csv = None) -> None:
    """Inference of the ViT of this study, and of one block of ViT-SO/14's width: processor time of one thread.

    Time of the processor and not of the clock, so that other work on the machine counts little. The calls take turns.
    """
    import timm
    import torch

    from gspn.bench import environment
    from gspn.bench.timing import peak_memory
    from gspn.timm import GSPNAdapter

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    wide = {"patch_size": 14, "embed_dim": 1152, "depth": 1, "num_heads": 16, "mlp_ratio": 3.7362}
    for what, options, sizes, batch in (
        ("the ViT of this study", VIT, (SIZE, 2 * SIZE, 4 * SIZE, 8 * SIZE), 4),
        ("one block of ViT-SO/14", wide, (224, 518, 1036), 1),
    ):
        for size in sizes:
            models = {}
            dim, depth = options["embed_dim"], options["depth"]
            for label, latent, keep in (
                ("attention", 0, ()), ("latent 16", 16, ()), ("latent 64", 64, ()), (f"all {dim} channels", None, ()),
                ("latent 64, 1 of 9 attentions kept", 64, (depth // 2,)),
            ):  # fmt: skip
                if keep and depth == 1:
                    continue
                model = timm.create_model(NAME, **{**options, "img_size": size}, num_classes=9).eval()
                if latent != 0:
                    GSPNAdapter.from_model(model, latent_dim=latent, keep_attention=keep).mount(model)
                models[label] = model
            images = torch.randn(batch, 3, size, size)
            tokens = (size // options["patch_size"]) ** 2

            def call(model: Any, images: Any = images) -> Any:
                with torch.inference_mode():
                    return model(images)

            times: dict[str, list[float]] = {label: [] for label in models}
            for turn in range(repeats + 1):
                for label, model in models.items():
                    begin = time.process_time()
                    call(model)
                    if turn:  # the first call warms up
                        times[label].append(1000 * (time.process_time() - begin))
            medians = {label: statistics.median(some) for label, some in times.items()}
            here = environment.describe(torch.device("cpu"))
            for label, model in models.items():
                peak = peak_memory(lambda model=model: call(model), torch.device("cpu")) or 0
                rows.append({
                    "entry": label, "model": what, "batch": batch, "size": size, "tokens": tokens,
                    "cpu_ms_p50": f"{medians[label]:.5g}",
                    "speed_over_attention": f"{medians['attention'] / medians[label]:.3g}",
                    "peak_mib": f"{peak / 2**20:.1f}", "samples": repeats, "device": here.device, "torch": here.torch,
                })  # fmt: skip
            write_csv(output, rows)  # after each size: the largest take long
    columns = ("entry", "model", "tokens", "cpu_ms_p50", "speed_over_attention", "peak_mib")
    print_table("inference, one thread", columns, [[row[key] for key in columns] for row in rows])


if __name__ == "__main__":
    app()

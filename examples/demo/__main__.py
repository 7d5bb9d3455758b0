"""A tour in minutes on a CPU: train, evaluate, classify, sample, explain, time. Writes one page with all results.

It goes by the clock: a slow machine, or one that is shared, does less of each, and the page says how much.

python examples/demo --output runs/demo
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import psutil
import timm
import torch
import typer
from figures import learning_curve, prediction_grid
from page import Page
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from gspn._console import default_console
from gspn._figures import save_figure
from gspn.analysis.drawing import draw_explanation
from gspn.analysis.explain import explain
from gspn.analysis.loading import load_model
from gspn.bench import environment
from gspn.bench.accuracy_check import require_accurate
from gspn.bench.mixer import PER_CHANNEL, SELF_ATTENTION, SHARED, MixerSweep
from gspn.bench.report import plain_number, plot_sweep
from gspn.bench.size_sweep import exponents
from gspn.cli.app import own_output
from gspn.data import Emoji, LabelledImages, MNIST5k, load_image
from gspn.tasks.class_conditional import sample
from gspn.tasks.classify import Prediction, TrainConfig, evaluate, predict, train
from gspn.tasks.classify.confusion import save_confusion
from gspn.tasks.diffusion.image_grid import draw_prompts
from gspn.tasks.diffusion.images import save_png
from gspn.tasks.text_to_image.pipelines import load_adapter, load_pipeline
from gspn.tasks.text_to_image.sample import UpscalingConfig
from gspn.tasks.text_to_image.sample import sample as sample_text

EPOCHS = 4
POINT = (305, 238)  # under the temple's eaves
SIDES = (16, 32, 48, 64, 96, 128)
DIGITS, EMOJI = "gspn_pico.mnist5k", "gspn_nano.emoji"
DENOISER, STEPS = "gspn_denoiser.mnist5k", 25
TEACHER, ADAPTER = "gspn_text_to_image.emoji", "gspn_adapter.emoji"
PROMPTS = (
    "red heart",
    "grinning cat",
    "two o’clock",
    "orange circle",
    "face with tears of joy",
    "a flat drawing of wine glass",
    "green book",
    "a fluent drawing of grinning face",
)  # fmt: skip
GUIDANCE = 4.0


def main(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", file_okay=False, help="Directory of the page."),
    ] = Path("runs/demo"),
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Most epochs of the training run.")] = EPOCHS,
    seconds: Annotated[
        float, typer.Option(metavar="SECONDS", min=30, help="Time for everything; parts are cut short to keep to it.")
    ] = 235,
) -> None:
    """Run the tour."""
    clock = Clock(seconds)
    console = default_console()
    page = Page(
        "GSPN: line scans in the place of attention",
        "This machine has trained a small model from nothing, classified images and generated others from noise with "
        "the weights of the package, computed what a pixel takes from all others, and timed the token mixer beside "
        "self-attention.",
    )
    output.mkdir(parents=True, exist_ok=True)
    if os.getloadavg()[0] > (os.cpu_count() or 1):
        torch.set_num_threads(1)  # several wait for one another where other work takes their turns
    # A part that begins late has less time.
    with clock.part("train") as share:
        train_digits(page, output, epochs, share, console)
    with clock.part("classify") as share:
        classify_images(page, output, share.amount, console)
    with clock.part("draw") as share:
        draw_images(page, output, share, console)
    with clock.part("text") as share:
        drawn = draw_from_text(page, output, share.amount, console)
    with clock.part("enlarge") as share:
        draw_large(page, output, share.amount, drawn, console)
    with clock.part("inside") as share:
        look_inside(page, output, share.amount, console)
    with clock.part("mixer") as share:
        time_the_mixer(page, output, share, console)

    here = environment.describe(torch.device("cpu"))
    seconds = clock.spent
    page.tile(f"{seconds / 60:.1f} min", "for everything on this page")
    page.footer(
        f"{here.device}, {here.threads} threads · gspn {here.gspn} · torch {here.torch} · Python {here.python} · "
        f"{here.os} · {time.strftime('%Y-%m-%d %H:%M')}"
    )
    report = output / "report.html"
    page.write(report)
    console.print(f"[bold]wrote[/] {escape(str(report))}  [dim]({seconds:.0f} s; open it in a browser)[/]")


@dataclass(frozen=True)
class Share:
    """The seconds that a part may use, and the amount of its whole work that fits into them, at most 1."""

    seconds: float
    amount: float


class Clock:
    """Divides the time that is left among the parts that are left, at the pace of this machine so far."""

    WEIGHTS: ClassVar = {"train": 90, "classify": 25, "draw": 30, "text": 20, "enlarge": 35, "inside": 10, "mixer": 25}
    """Seconds of each part on two cores that do nothing else."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.pace = seconds, 1.0
        self.started = psutil.Process().create_time()  # imports take their time, too
        self.left = dict(self.WEIGHTS)

    @property
    def spent(self) -> float:
        """Seconds since the process began."""
        return time.time() - self.started

    @contextmanager
    def part(self, name: str) -> Iterator[Share]:
        """The time of a part; how long it takes in truth sets the pace of those that follow."""
        seconds = max(self.seconds - self.spent, 1.0) * self.left[name] / sum(self.left.values())
        whole = self.left.pop(name)
        share, begun = Share(seconds, min(1.0, seconds / (whole * self.pace))), self.spent
        yield share
        self.pace = max((self.spent - begun) / whole / share.amount, 0.5)


def seconds_an_image() -> float:
    """The time of an image in an evaluation of the model that is trained."""
    model, images = timm.create_model("gspn_pico", num_classes=10).eval(), torch.rand(32, 3, 28, 28)
    with torch.inference_mode():
        model(images)
        begun = time.perf_counter()
        model(images)
    return (time.perf_counter() - begun) / len(images)


def train_digits(page: Page, output: Path, epochs: int, share: Share, console: Console) -> None:
    """A training run from nothing, evaluated."""
    # Evaluations take a fixed time: where it would be a large part of all, there is a set of fewer images.
    image_s = seconds_an_image()
    small = image_s * 3000 > share.seconds / 3
    data, size, count, tests = ("digits", 8, 1433, 364) if small else ("mnist5k", 28, 4000, 1000)
    console.rule(f"training gspn_pico on {count:,} digits")
    preset = f"{data}_pico"
    run = output / preset
    if run.exists():
        shutil.rmtree(run)  # from an earlier tour
    # A schedule this short has no time for the preset's regularisation.
    config = TrainConfig.load(preset).changed(
        f"schedule.epochs={epochs}", "schedule.warmup_epochs=0.5", f"run.output={run}",
        f"run.stop_after_s={max(share.seconds - 3 * tests * image_s, share.seconds / 3):.0f}",
    )  # fmt: skip
    result = train(config, console=console)
    assert result.last is not None
    planned = epochs * (count // config.data.batch_size)
    reached = f"{epochs} epochs" if result.last.step >= planned else f"{result.last.step} of {planned} updates"
    learning_curve(run / "metrics.csv", output / "learning.png")
    shown = [(output / "learning.png", "Accuracy and loss on the test digits after each epoch.")]
    if image_s * tests < share.seconds / 6:
        save_confusion(evaluate(run / "best", data=data, console=console), output / "confusion.png")
        shown.append((output / "confusion.png", "Which digit was taken for which."))
    images_per_second = result.last.images_per_second
    page.tile(f"{result.best_score:.1f} %", f"of {tests:,} unseen digits right after {reached} on {count:,}")
    page.tile(f"{images_per_second:,.0f} / s", "images through a training step")
    page.section(
        "Trained here",
        f"gspn_pico, 1 million parameters, on {data} ({count:,} to train, {tests:,} to "
        f"test, {size} x {size} pixels), for {reached} of a schedule of {epochs} epochs."
        + ("" if result.last.step >= planned else " The time that was set aside for it ended before the schedule did.")
        + (" This machine has little time, or is shared, so the smallest set of digits was taken." if small else ""),
    )
    page.command(f"gspn classify train --config {preset} --epochs {epochs}")
    page.images(*shown)


def classify_images(page: Page, output: Path, amount: float, console: Console) -> None:
    """Images classified with the weights of the package."""
    console.rule("classifying with the weights of the package")
    digits, emoji = MNIST5k("val"), Emoji("val")
    shown = {}
    for name, dataset, count, columns in ((DIGITS, digits, 24, 12), (EMOJI, emoji, 36, 9)):
        images, truths, guesses = classified(dataset, count, name)
        prediction_grid(images, guesses, truths, output / f"{name}.png", columns=columns)
        seen = max(count, round(amount * len(dataset)))
        _, truths, guesses = classified(dataset, seen, name)
        right = sum(guess.classes[0] == truth for guess, truth in zip(guesses, truths, strict=True)) / seen
        shown[name] = f"{100 * right:.1f} %", f"{seen:,} of {len(dataset):,}"
        console.print(f"{name}: {100 * right:.2f} % right of {shown[name][1]}")
    page.tile(shown[DIGITS][0], f"digits right with the shipped gspn_pico, of {shown[DIGITS][1]} test images")
    page.tile(shown[EMOJI][0], f"emoji with unseen names put into the right one of 9 categories, of {shown[EMOJI][1]}")
    page.section(
        "Classified with the shipped weights",
        "Test digits, and emoji whose names were not in the training set, with the most probable class.",
    )
    page.command(f"gspn classify predict image.png --model {EMOJI}")
    page.images((output / f"{DIGITS}.png", f"{DIGITS}: test digits. Green is right, red is wrong."))
    page.images((output / f"{EMOJI}.png", f"{EMOJI}: emoji with unseen names."))


def classified(
    dataset: LabelledImages, count: int, model: str
) -> tuple[list[Image.Image], list[str], list[Prediction]]:
    """Some images, spread over the classes, which lie one after another; their true classes; the model's."""
    picks = [round(i * (len(dataset) - 1) / (count - 1)) for i in range(count)]
    images = [dataset.image(i) for i in picks]
    return images, [dataset.classes[dataset.target(i)] for i in picks], predict(images, model)


def draw_images(page: Page, output: Path, share: Share, console: Console) -> None:
    """Digits from noise by the denoiser of the package, and how many of them are of their class."""
    console.rule("drawing digits from noise with the weights of the package")
    drawn = output / "drawn"
    if drawn.exists():
        shutil.rmtree(drawn)  # from an earlier tour
    number, options = 10, {"output": drawn, "steps": STEPS, "guidance": 2.0, "console": console}
    result = sample(DENOISER, number=number, **options)  # one of each, whose time tells how many there is time for
    more = min(120, int(share.seconds / result.seconds - 1) * 10)
    if more > number:
        number, result = more, sample(DENOISER, number=more, **options)
    guesses = predict([drawn / f"{record.index:05d}.png" for record in result.records], DIGITS)
    right = [guess.indices[0] == record.label for guess, record in zip(guesses, result.records, strict=True)]
    console.print(f"{DENOISER}: {sum(right)} of {len(right)} are of their class, in {result.seconds:.1f} s")
    page.tile(f"{result.seconds / len(right):.2f} s", f"to draw a digit from noise, {STEPS} steps with guidance")
    page.section(
        "Drawn from noise",
        f"Images of a class-conditional denoiser with GSPN's scans, without attention or positional embedding, in "
        f"{STEPS} steps: a row for each class. The shipped classifier assigns {sum(right)} of {len(right)} to the "
        "class that was asked for.",
    )
    page.command(f"gspn class-conditional sample {DENOISER} --number {number} --steps {STEPS} --guidance 2")
    if result.grid is not None:
        page.images((result.grid, f"{DENOISER}: handwritten digits that nobody wrote."))


def draw_from_text(page: Page, output: Path, amount: float, console: Console) -> tuple[Any, Any]:
    """The same prompts and noise with a UNet's self-attention and with GSPN in its place; returns both models."""
    console.rule("drawing emoji from text, with attention and with GSPN in its place")
    pipeline, adapter, steps = load_pipeline(TEACHER), load_adapter(ADAPTER), max(8, round(STEPS * amount))
    rows: dict[str, list[Image.Image]] = {}
    seconds = {}
    for name, mounted in (("attention", None), ("GSPN", adapter)):
        folder = output / f"text-{name}"
        if folder.exists():
            shutil.rmtree(folder)  # from an earlier tour
        drawn = sample_text(
            pipeline, PROMPTS, adapter=mounted, output=folder, steps=steps, guidance=GUIDANCE, batch_size=len(PROMPTS),
            check=False, device="cpu", console=console,
        )  # fmt: skip
        seconds[name] = drawn.seconds / len(PROMPTS)
        rows[name] = [load_image(folder / f"{record.index:05d}.png") for record in drawn.records]
    save_png(output / "text.png", draw_prompts(rows, PROMPTS))
    page.tile(
        f"{seconds['GSPN']:.2f} s",
        f"to draw an emoji from its name, {steps} steps; {seconds['attention']:.2f} s with attention",
    )
    page.section(
        "Drawn from text",
        "A small text-to-image model of the Stable Diffusion kind, and the same with GSPN in the place of all its "
        f"self-attention: the same prompts, noise and {steps} steps. {seconds['attention']:.2f} s an image with "
        f"attention and {seconds['GSPN']:.2f} s with GSPN, at a size where attention has 256 tokens and costs little.",
    )
    page.command(f'gspn t2i sample "{PROMPTS[0]}" --model {TEACHER} --adapter {ADAPTER} --steps {steps} --guidance 4')
    page.images((output / "text.png", "Attention above, GSPN below."))
    return pipeline, adapter


def draw_large(page: Page, output: Path, amount: float, models: tuple[Any, Any], console: Console) -> None:
    """Images four times as large as those of the training."""
    if amount < 0.5:
        page.text("There was no time left for images at four times the size of the training.")
        return
    pipeline, adapter = models
    count = max(1, round(4 * amount))
    large = output / "text-large"
    if large.exists():
        shutil.rmtree(large)
    upscaled = sample_text(
        pipeline, PROMPTS[:count], adapter=adapter, output=large, steps=STEPS, guidance=GUIDANCE, batch_size=count,
        height=256, width=256, upscale=UpscalingConfig(dilated=True), check=False, device="cpu", console=console,
    )  # fmt: skip
    enlarged = {"GSPN": [load_image(large / f"{i:05d}.png") for i in range(count)]}
    save_png(output / "text-large.png", draw_prompts(enlarged, PROMPTS[:count], columns=count))
    page.text(
        f"At four times the size of the training, by progressive upscaling in three stages, each starting "
        f"from the one before: {upscaled.seconds / count:.1f} s an image."
    )
    page.command(f'gspn t2i sample "{PROMPTS[0]}" --model {TEACHER} --adapter {ADAPTER} --size 256 --upscale --dilated')
    page.images((output / "text-large.png", "256 x 256 pixels, from a model of 64 x 64."))


def look_inside(page: Page, output: Path, amount: float, console: Console) -> None:
    """The affinity of a pixel of a photograph with every other."""
    console.rule("explaining a model on a photograph")
    from sklearn.datasets import load_sample_image

    photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1) / 255
    size = 448 if amount > 0.5 else 224
    explanation = explain(load_model(EMOJI), photograph, POINT, stage=1, size=size)
    save_figure(draw_explanation(explanation, photograph), output / "affinity.png")
    rows = explanation.stability
    worst = max(max(abs(row.tap_sum_max - 1), abs(row.tap_sum_min - 1)) for row in rows)
    page.section(
        "What a pixel takes from every other",
        f"The affinity of one point of a photograph in {EMOJI} ({explanation.module}), by one vector-Jacobian product "
        f"a direction, without the matrix. The weights of each of the model's {len(rows)} scans sum to one within "
        f"{worst:.0e}: the paper's stability condition, measured.",
    )
    page.command(f"gspn explain photograph.jpg --point {POINT[0]},{POINT[1]} --model {EMOJI} --stage 1 --size {size}")
    page.images((output / "affinity.png", "Brighter is more. Four scans together reach the whole image."))


def time_the_mixer(page: Page, output: Path, share: Share, console: Console) -> None:
    """The token mixer beside self-attention of the same width, on growing maps."""
    console.rule("timing the mixer beside self-attention")
    sweep = MixerSweep()
    require_accurate(sweep.check())
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True
    ) as progress:
        sides = SIDES[: max(3, round(share.amount * len(SIDES)))]
        task = progress.add_task("map sizes", total=len(sides))
        results = sweep.measure(
            sides,
            (PER_CHANNEL, SHARED, SELF_ATTENTION),
            slowest_ms=min(1500, 30 * share.seconds),
            repeats=3,
            min_time=0.05,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    growth = exponents(results)
    subtitle = f"width {sweep.channels}, batch 1, float32, forward, {torch.get_num_threads()} CPU threads"
    save_figure(plot_sweep(results, growth, "Token mixers on growing maps", subtitle), output / "mixer.png")
    names = list(dict.fromkeys(result.name for result in results))
    ms = {(result.name, result.height): result.timing.p50 for result in results if result.timing is not None}
    sides = sorted({side for _, side in ms})
    page.section(
        "The mixer beside self-attention",
        "One forward pass of GSPN's token mixer, with all its projections, beside self-attention of the same width "
        "with its own (PyTorch's fused kernel), on growing maps. Attention compares every pixel with every other; "
        "a scan visits each line once.",
    )
    page.command("gspn bench mixer")
    page.images((output / "mixer.png", "Both axes logarithmic: a straight line is a power of the number of pixels."))
    rows = [
        [f"{side} x {side}", *(f"{plain_number(ms[name, side])} ms" if (name, side) in ms else "-" for name in names)]
        for side in sides
    ]
    page.table(["map", *names], rows)
    both = [side for side in sides if (SELF_ATTENTION, side) in ms and (SHARED, side) in ms]
    if both:
        largest = both[-1]
        ratio = ms[SELF_ATTENTION, largest] / ms[SHARED, largest]
        page.tile(f"{ratio:.1f}x", f"attention's time over the mixer's (shared taps) on a {largest} x {largest} map")


if __name__ == "__main__":
    with own_output():
        typer.run(main)

"""The tab *Emoji*: one prompt drawn with self-attention, and with GSPN in its place."""

from __future__ import annotations

import io
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from PIL import Image

from .._console import Console
from .._errors import UsageError
from ..data import load_image
from .class_conditional import MOST_SEED, MOST_STEPS
from .components import EVENT, errors_on_page
from .models import Models, Names, sizes

STYLES = ("noto", "blob", "fluent", "flat", "twemoji", "outlined")
"""The styles that the shipped model learnt; a name without a style is drawn in the first."""
LONGEST_PROMPT = 200


def caption(name: str, style: str) -> str:
    """The caption of an emoji in a style, as the shipped model learnt them.

    Example:
        >>> caption("grinning cat", "noto"), caption("red apple", "outlined")
        ('grinning cat', 'an outlined drawing of red apple')
    """
    return name if style == STYLES[0] else f"{'an' if style[0] in 'aeiou' else 'a'} {style} drawing of {name}"


def draw(
    pipeline: Any, adapter: Any, prompt: str, *, size: int, steps: int, guidance: float, seed: int,
    device: str = "auto",
) -> Iterator[tuple[Image.Image, float]]:  # fmt: skip
    """The image of a prompt and its seconds: first with the pipeline's attention, then with the adapter.

    They are those of ``gspn t2i sample --scheduler dpm++``, with ``--upscale`` above the size of the training.
    """
    from ..tasks.text_to_image.sample import sample

    trained = trained_side(pipeline)
    for mounted in (None, adapter):
        with TemporaryDirectory(prefix="gspn-app-") as folder:
            result = sample(
                pipeline, prompt, output=folder, adapter=mounted, width=size, height=size, steps=steps,
                guidance=guidance, seed=seed, scheduler="dpm++", upscale=size > trained, device=device, check=False,
                console=Console(file=io.StringIO()),
            )  # fmt: skip
            yield load_image(result.records[0].path(result.directory)), result.seconds


def loaded(models: Models) -> tuple[Any, Any]:
    """The pipeline and the adapter; at the first call both ways run for a step, so that times begin after it."""
    first = "text_to_image" not in vars(models)
    pipeline, adapter = models.text_to_image
    if first:
        side = trained_side(pipeline)
        list(draw(pipeline, adapter, "", size=side, steps=1, guidance=1.0, seed=0, device=models.device))
    return pipeline, adapter


def trained_side(pipeline: Any) -> int:
    """The longer side in pixels of the images that a pipeline was trained on."""
    from ..tasks.text_to_image.sample.progressive_upscaling import trained_size

    return max(trained_size(pipeline.unet, pipeline.vae_scale_factor))


def add_tab(tab: gr.Tab, models: Models) -> None:
    """Put the tab onto the page."""
    shipped = models.names.text_to_image == Names().text_to_image
    gr.Markdown(
        "**Draw from text.** The same prompt and the same noise, drawn twice: with the self-attention that the model "
        "was trained with, and with GSPN in the place of every self-attention."
    )
    with gr.Row():
        with gr.Column(min_width=300):
            prompt = gr.Textbox(
                "grinning cat", label="What to draw", max_length=LONGEST_PROMPT, elem_id="prompt",
                info="The name of an emoji, such as red apple, rocket or snowman." if shipped else None,
            )  # fmt: skip
            style = gr.Radio(STYLES, value=STYLES[0], label="Style", visible=shipped, elem_id="emoji-style")
            size = gr.Radio(sizes(64, 4), value=64, label="Size in pixels", info="Larger ones are drawn in stages.")
            steps = gr.Slider(1, MOST_STEPS, value=12, step=1, label="Denoising steps", elem_id="emoji-steps")
            guidance = gr.Slider(0, 15, value=4, step=0.5, label="Guidance", info="1: none; more: closer to the text")
            seed = gr.Number(
                0, precision=0, minimum=0, maximum=MOST_SEED, label="Seed", info="The same seed draws the same."
            )
            button = gr.Button("Draw", variant="primary", elem_id="emoji-draw")
        with gr.Column(min_width=300):
            with gr.Row():
                images, texts = [], []
                for name, key in (("Self-attention", "attention"), ("GSPN", "gspn")):
                    with gr.Column(min_width=130):
                        images.append(gr.Image(
                            label=name, type="pil", format="png", interactive=False, buttons=["download"],
                            elem_id=f"emoji-{key}", elem_classes="pixels square",
                        ))  # fmt: skip
                        texts.append(gr.Markdown(elem_classes="faint", elem_id=f"time-{key}"))
            used = gr.Markdown(elem_classes="faint")

    def load(size_: int) -> Any:
        with errors_on_page():
            pipeline, _ = loaded(models)
            sides = sizes(trained_side(pipeline), pipeline.vae_scale_factor)
            return gr.Radio(choices=sides, value=size_ if size_ in sides else sides[0])

    def run(
        name: str, style_: str, size_: int, steps_: int, guidance_: float, seed_: int | None
    ) -> Iterator[tuple[Any, ...]]:
        with errors_on_page():
            text = " ".join((name or "").split())
            if not text or len(text) > LONGEST_PROMPT:
                raise UsageError(f"Write what to draw, in 1 to {LONGEST_PROMPT} letters; these are {len(text)}.")
            text = caption(text, style_) if shipped else text
            told = f"Prompt: {text}"
            yield None, "drawing ...", None, "", told
            pipeline, adapter = loaded(models)
            drawn: list[Any] = []
            for image, seconds in draw(
                pipeline, adapter, text, size=int(size_), steps=int(steps_), guidance=guidance_, seed=int(seed_ or 0),
                device=models.device,
            ):  # fmt: skip
                drawn += [image, f"{seconds:.1f} s"]
                yield *drawn, *((None, "drawing ...") if len(drawn) == 2 else ()), told

    tab.select(load, [size], [size], show_progress="hidden", **EVENT)
    outputs = [images[0], texts[0], images[1], texts[1], used]
    values = [prompt, style, size, steps, guidance, seed]
    for event in (button.click, prompt.submit):
        event(run, values, outputs, **EVENT)

"""The tab *Digits*: images of a class, by a denoiser without attention."""

from __future__ import annotations

import time
from typing import Any

import gradio as gr
from PIL import Image

from .components import EVENT, errors_on_page
from .models import Models, sizes

MOST_STEPS, MOST_IMAGES, MOST_SEED = 100, 8, 2**31 - 1


def draw(
    pipeline: Any, class_name: str, *, number: int, size: int, steps: int, guidance: float, seed: int
) -> list[Image.Image]:
    """The images that ``gspn class-conditional sample`` draws with the same values.

    Example:
        >>> from gspn.app.models import Models
        >>> images = draw(Models().denoiser, "3", number=2, size=28, steps=2, guidance=1.0, seed=0)
        >>> [image.size for image in images]
        [(28, 28), (28, 28)]
    """
    from ..tasks.class_conditional.sampling import sample_batch, sample_records

    labels = pipeline.label_ids([class_name])
    values = {"seed": seed, "steps": steps, "guidance": guidance, "model": ""}
    records = sample_records(pipeline, labels, number, height=size, width=size, **values)
    return sample_batch(pipeline, records)


def add_tab(tab: gr.Tab, models: Models) -> None:
    """Put the tab onto the page."""
    gr.Markdown(
        "**Draw by class.** A denoiser draws images of a class, step by step out of noise. Its layers are GSPN's line "
        "scans; it has no attention."
    )
    with gr.Row():
        with gr.Column(min_width=300):
            # Of the shipped denoiser; those of another come when it is loaded.
            class_name = gr.Dropdown([str(i) for i in range(10)], value="3", label="Class", elem_id="digit-class")
            size = gr.Radio(sizes(28), value=28, label="Size in pixels", info="The model was trained at the first.")
            number = gr.Slider(1, MOST_IMAGES, value=4, step=1, label="Images", elem_id="digit-number")
            steps = gr.Slider(1, MOST_STEPS, value=25, step=1, label="Denoising steps", elem_id="digit-steps")
            guidance = gr.Slider(0, 10, value=2, step=0.1, label="Guidance", info="1: none; more: closer to the class")
            seed = gr.Number(
                0, precision=0, minimum=0, maximum=MOST_SEED, label="Seed", info="The same seed draws the same."
            )
            button = gr.Button("Draw", variant="primary", elem_id="digit-draw")
        with gr.Column(min_width=300):
            gallery = gr.Gallery(
                label="Images", columns=2, height="auto", object_fit="contain", format="png", buttons=["download"],
                elem_id="digits", elem_classes="images pixels", interactive=False,
            )  # fmt: skip
            words = gr.Markdown(elem_classes="faint", elem_id="digits-words")

    def load(class_: str, size_: int) -> Any:
        with errors_on_page():
            pipeline = models.denoiser
            names = list(pipeline.config["id2label"].values()) or [str(i) for i in range(pipeline.num_classes or 1)]
            sides = sizes(pipeline.default_size, pipeline.pixels_per_latent * pipeline.transformer.config.patch_size)
            return (
                gr.Dropdown(choices=names, value=class_ if class_ in names else names[0]),
                gr.Radio(choices=sides, value=size_ if size_ in sides else sides[0]),
            )

    def run(class_: str, size_: int, number_: int, steps_: int, guidance_: float, seed_: int | None) -> Any:
        with errors_on_page():
            pipeline = models.denoiser
            start = time.perf_counter()
            images = draw(
                pipeline, class_, number=int(number_), size=int(size_), steps=int(steps_), guidance=guidance_,
                seed=int(seed_ or 0),
            )  # fmt: skip
            many = "1 image" if len(images) == 1 else f"{len(images)} images"
            return images, f"{many} of {size_} x {size_} pixels in {time.perf_counter() - start:.1f} s."

    tab.select(load, [class_name, size], [class_name, size], show_progress="hidden", **EVENT)
    button.click(run, [class_name, size, number, steps, guidance, seed], [gallery, words], **EVENT)

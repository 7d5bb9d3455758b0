"""The tab *Classify*: the most probable classes of an image."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from .components import EVENT, enlarged, errors_on_page, image_and_examples, on_image
from .models import CLASSIFIERS, Models

_LEARNT = {
    CLASSIFIERS[0]: "It learnt nine categories of emoji, and sorts every image into one of them.",
    CLASSIFIERS[1]: "It learnt handwritten digits, white on black, and takes every image for one of them.",
}


def shares(model: Any, image: Image.Image, device: str = "auto") -> dict[str, float]:
    """The probabilities of the five most probable classes, by name.

    Example:
        >>> from gspn.app.models import Models
        >>> shares(Models().classifier("gspn_pico.mnist5k"), Image.new("RGB", (28, 28))).keys() <= set("0123456789")
        True
    """
    from ..tasks.classify import predict

    [prediction] = predict([image], model.model, top=5, device=device)  # type: ignore[arg-type]
    return dict(zip(prediction.classes, prediction.probabilities, strict=True))


def add_tab(models: Models) -> None:
    """Put the tab onto the page."""
    gr.Markdown("**Classify.** Choose an image, and see the five most probable classes, each with its probability.")
    with gr.Row():
        with gr.Column(min_width=300):
            upload, gallery = image_and_examples("classify-image")
        with gr.Column(min_width=300):
            model = gr.Dropdown(models.classifiers, label="Model", elem_id="classify-model")
            label = gr.Label(label="Classes", num_top_classes=5, elem_id="classes")
            note = gr.Markdown(_LEARNT.get(models.classifiers[0], ""), elem_classes="faint")
    image_state = gr.State(None)

    def classify(image: Image.Image | None, name: str) -> Any:
        with errors_on_page():
            if image is None:
                return gr.skip(), gr.skip(), gr.skip(), _LEARNT.get(name, "")
            return enlarged(image), shares(models.classifier(name), image, models.device), image, _LEARNT.get(name, "")

    outputs = [upload, label, image_state, note]
    on_image(upload, gallery, classify, [model], outputs, [label, image_state])
    model.input(classify, [image_state, model], outputs, show_progress_on=label, **EVENT)

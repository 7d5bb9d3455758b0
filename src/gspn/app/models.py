"""The models of the page, each loaded when it is first used."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

CLASSIFIERS = ("gspn_nano.emoji", "gspn_pico.mnist5k")
"""The shipped classifiers."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names of the models: shipped names, directories of runs or of saved models, or hub ids."""

    classifier: str = CLASSIFIERS[0]
    denoiser: str = "gspn_denoiser.mnist5k"
    text_to_image: str = "gspn_text_to_image.emoji"
    adapter: str = "gspn_adapter.emoji"


class Models:
    """The models of the page; it computes one thing at a time, so nothing here is locked.

    Args:
        names: their names.
        device: ``"auto"``, a GPU if there is one, or ``"cpu"``.

    Example:
        >>> from gspn.app.models import Models, Names
        >>> models = Models(Names(classifier="gspn_pico.mnist5k"))
        >>> models.classifiers, models.classifier("gspn_pico.mnist5k").input_size
        (['gspn_pico.mnist5k', 'gspn_nano.emoji'], (3, 28, 28))
    """

    def __init__(self, names: Names | None = None, device: str = "auto") -> None:
        self.names = names or Names()
        self.device = device
        self._classifiers: dict[str, Any] = {}

    @property
    def classifiers(self) -> list[str]:
        """The names of the classifiers to choose from, the first by default."""
        return list(dict.fromkeys((self.names.classifier, *CLASSIFIERS)))

    def classifier(self, name: str) -> Any:
        """One of :attr:`classifiers`, a :class:`gspn.analysis.loading.LoadedModel` on the device.

        Raises:
            UsageError: it cannot be loaded.
        """
        if name not in self._classifiers:
            from ..analysis.loading import LoadedModel
            from ..tasks.classify.model import load_model

            self._classifiers[name] = LoadedModel(load_model(name).to(self._where), name, "pretrained")
        return self._classifiers[name]

    @cached_property
    def denoiser(self) -> Any:
        """The class-conditional pipeline on the device.

        Raises:
            UsageError: it cannot be loaded.
        """
        from ..tasks.class_conditional import load_pipeline
        from ..tasks.diffusion.schedulers import named_scheduler

        pipeline = load_pipeline(self.names.denoiser).to(self._where)
        pipeline.scheduler = named_scheduler("auto", pipeline.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @cached_property
    def text_to_image(self) -> tuple[Any, Any]:
        """The text-to-image pipeline and the adapter, which is not mounted.

        Raises:
            UsageError: one of them cannot be loaded.
            MissingExtraError: the text encoder is not installed.
        """
        from ..tasks.text_to_image.pipelines import load_adapter, load_pipeline

        return load_pipeline(self.names.text_to_image), load_adapter(self.names.adapter)

    def check(self) -> None:
        """Find out at the start whether the models exist, if somebody named others than the shipped ones.

        Raises:
            UsageError: one of them does not.
        """
        names = self.names
        if names == Names():
            return
        self.classifier(names.classifier)
        from ..tasks import class_conditional
        from ..tasks.diffusion.pretrained import locate
        from ..tasks.text_to_image import pipelines

        shipped = class_conditional.shipped_pipelines()
        locate(names.denoiser, "model_index.json", shipped, "denoiser", "gspn class-conditional train")
        shipped = pipelines.shipped_pipelines()
        locate(names.text_to_image, "model_index.json", shipped, "text-to-image pipeline", "gspn t2i train")
        locate(names.adapter, "config.json", pipelines.shipped_adapters(), "adapter", "gspn t2i distill")

    @property
    def _where(self) -> torch.device:
        from ..tasks.core.devices import inference_device

        return inference_device(self.device)


def sizes(trained: int, multiple: int = 1, most: int = 2048) -> list[int]:
    """Sides of images to choose from: that of the training, and up to twice it.

    Example:
        >>> sizes(28), sizes(64, 4), sizes(512, 8, most=512)
        ([28, 42, 56], [64, 96, 128], [512])
    """
    sides = [round(factor * trained / multiple) * multiple for factor in (1, 1.5, 2)]
    return [trained, *(side for side in sides[1:] if trained < side <= most)]

"""What a ladder has finished, on the disk: a run that was stopped goes on after its last whole stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...._files import replaced, write_text
from ...core.errors import UsageError, require

DIRECTORY = "ladder"
"""In the directory of the images."""

_SETTINGS = "settings.json"
_LATENTS = "latents"
_MARKS = "gspn"
_SAMPLED = 8  # of each weight, at least


class LadderState:
    """The finished stages of a run's images, and the settings that they were made with.

    Args:
        directory: Of the images.
        settings: What the images depend on, as JSON has it.

    Raises:
        UsageError: the directory holds a ladder with other settings; the first that differs is named.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory / DIRECTORY
        self.settings = json.loads(json.dumps(settings))
        found = read_settings(directory)
        for key in {} if found is None else self.settings | found:
            before, now = (found or {}).get(key), self.settings.get(key)
            if before != now:
                raise UsageError(
                    f"{str(directory)!r} holds a ladder with {key}={_short(before)}, and this run has {_short(now)}; "
                    "give what it was started with, or another output."
                )
        text = json.dumps(self.settings, indent=1)
        self._digest = hashlib.sha256(text.encode()).hexdigest()
        if found is None:
            write_text(self.directory / _SETTINGS, text + "\n")

    def save(self, index: int, stage: int, latents: Tensor) -> None:
        """Keep an image's latents ``[C, h, w]`` of a finished stage, counted from 0."""
        require("safetensors")
        from safetensors.torch import save_file

        kept = latents.detach().cpu().contiguous()
        with replaced(self._path(index, stage)) as part:
            save_file({_LATENTS: kept}, part, metadata=self._marks(index, stage, kept))

    def load(self, index: int, stage: int, shape: tuple[int, ...]) -> Tensor | None:
        """What :meth:`save` kept; None where there is none, or the file is damaged or of something else."""
        require("safetensors")
        from safetensors import SafetensorError, safe_open

        path = self._path(index, stage)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                marks, latents = file.metadata(), file.get_tensor(_LATENTS)
        except (SafetensorError, OSError, ValueError):
            return None
        whole = tuple(latents.shape) == shape and marks == self._marks(index, stage, latents)
        return latents if whole else None

    def _path(self, index: int, stage: int) -> Path:
        return self.directory / f"{index:05d}-stage{stage + 1}.safetensors"

    def _marks(self, index: int, stage: int, latents: Tensor) -> dict[str, str]:
        content = hashlib.sha256(latents.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        # One entry: the order of several in a file is chance, and the same run has to write the same bytes.
        return {_MARKS: json.dumps([self._digest, index, stage, content])}


def read_settings(directory: Path) -> dict[str, Any] | None:
    """The settings of the ladder in a directory of images, or None where there is none.

    Raises:
        UsageError: they cannot be read.
    """
    path = directory / DIRECTORY / _SETTINGS
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{str(path)!r} is damaged; remove {str(path.parent)!r}, or give another output.")
    return found


def fingerprint(module: nn.Module) -> str:
    """A mark of a module's weights, from a few numbers of each: other weights have another, at next to no cost."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLED)][: 2 * _SAMPLED].double().cpu()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."

"""The finished stages of a run's images, on the disk: a run that was stopped continues after its last whole stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...._files import write_text
from ...core.errors import UsageError, require
from ...diffusion.digests import digest
from ...diffusion.shard_cache import save_tensors, short

DIRECTORY = "stages"
"""In the directory of the images."""

_SETTINGS = "settings.json"
_LATENTS = "latents"
_METADATA = "gspn"


class StageCache:
    """The finished stages of a run's images, and the settings that they were sampled with.

    Args:
        directory: Of the images.
        settings: Everything that the images depend on, as JSON has it.

    Raises:
        UsageError: The directory was begun with other settings; the first that differs is named.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory / DIRECTORY
        self.settings = json.loads(json.dumps(settings))
        begun = read_settings(directory)
        for key in {} if begun is None else self.settings | begun:
            before, now = (begun or {}).get(key), self.settings.get(key)
            if before != now:
                raise UsageError(
                    f"{str(directory)!r} holds a run with {key}={short(before)}, and this run has {short(now)}; "
                    "pass the arguments that it was started with, or name another output."
                )
        text = json.dumps(self.settings, indent=1)
        self._digest = digest([text.encode()])
        if begun is None:
            write_text(self.directory / _SETTINGS, text + "\n")

    def save(self, index: int, stage: int, latents: Tensor) -> None:
        """Keep an image's latents ``[C, h, w]`` of a finished stage, counted from 0."""
        save_tensors(self._path(index, stage), {_LATENTS: latents}, self._metadata(index, stage, latents))

    def load(self, index: int, stage: int, shape: tuple[int, ...]) -> Tensor | None:
        """The latents that :meth:`save` kept; None where there are none, or the file is damaged or of another run."""
        require("safetensors")
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(index, stage), framework="pt") as file:
                metadata, latents = file.metadata(), file.get_tensor(_LATENTS)
        except (SafetensorError, OSError, ValueError):
            return None
        whole = tuple(latents.shape) == shape and metadata == self._metadata(index, stage, latents)
        return latents if whole else None

    def _path(self, index: int, stage: int) -> Path:
        return self.directory / f"{index:05d}-stage{stage + 1}.safetensors"

    def _metadata(self, index: int, stage: int, latents: Tensor) -> dict[str, str]:
        # A single entry: safetensors writes several in no fixed order, and the same run has to write the same bytes.
        return {_METADATA: json.dumps([self._digest, index, stage, digest([latents])])}


def read_settings(directory: Path) -> dict[str, Any] | None:
    """The settings of the stages in a directory of images, or None where there are none.

    Raises:
        UsageError: They cannot be read.
    """
    path = directory / DIRECTORY / _SETTINGS
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise UsageError(f"{str(path)!r} is damaged; remove {str(path.parent)!r}, or name another output.")
    return settings

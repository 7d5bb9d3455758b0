"""Checkpoints of a run: written as a whole or ignored; the last two are kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._files import sync, write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

_PREFIX = "step-"
_STATE = "state.json"


class CheckpointStore:
    """The checkpoints in one directory, each a directory named after its update.

    A checkpoint is written under a temporary name, synced to the disk and then renamed, so that an interrupted one
    never has the name of a complete one. Older ones are removed only after that. Loading executes no code from files:
    tensors come from safetensors or from ``torch.load(weights_only=True)``.

    All processes of a run call :meth:`save` and :meth:`load` together, on a file system that they share.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory
        self.keep = keep

    def newest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        whole = [path for path in self._named() if self._is_whole(path)]
        return whole[-1] if whole else None

    def save(self, accelerator: Accelerator, step: int, state: Mapping[str, Any]) -> None:
        """Save the objects that the accelerator prepared or has registered, and ``state``, as JSON.

        Raises:
            OSError: the disk is full or the directory not writable; earlier checkpoints stay.
        """
        final = self.directory / f"{_PREFIX}{step:09d}"
        part = self.directory / f".part-{final.name}"
        if accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(os.fspath(part))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = sorted(path for path in part.rglob("*") if path.is_file())
            sizes = {os.fspath(file.relative_to(part)): file.stat().st_size for file in files}
            write_text(part / _STATE, json.dumps({"state": dict(state), "sizes": sizes}, indent=1))
            for path in (*part.rglob("*"), part):
                sync(path)
            if final.exists():  # an incomplete one: update numbers grow
                shutil.rmtree(final)
            part.rename(final)
            sync(self.directory)
            self._remove_older()
        accelerator.wait_for_everyone()

    def load(self, accelerator: Accelerator, path: Path) -> dict[str, Any]:
        """Load a checkpoint into the objects of the accelerator; returns its ``state``."""
        accelerator.load_state(os.fspath(path))
        return json.loads((path / _STATE).read_text(encoding="utf-8"))["state"]

    def _named(self) -> list[Path]:
        return sorted(path for path in self.directory.glob(f"{_PREFIX}*") if path.is_dir())

    def _is_whole(self, path: Path) -> bool:
        try:
            sizes = json.loads((path / _STATE).read_text(encoding="utf-8"))["sizes"]
            return all((path / name).stat().st_size == size for name, size in sizes.items())
        except (OSError, ValueError, KeyError):
            return False

    def _remove_older(self) -> None:
        for path in self._named()[: -self.keep]:
            # Renamed first, in one step: a half-removed directory must not look like a checkpoint.
            gone = path.with_name(f".part-old-{path.name}")
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        for path in self.directory.glob(".part-*"):
            shutil.rmtree(path, ignore_errors=True)

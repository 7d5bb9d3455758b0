"""A small cache for the tests: numbers and their squares, in shards of four."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from gspn.tasks.diffusion import shard_cache
from gspn.tasks.diffusion.shard_cache import CacheIndex, CacheWriter

_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, kw_only=True)
class NumberIndex(CacheIndex):
    """Of numbers."""

    NAME: ClassVar[str] = "numbers"

    factor: float = 1.0
    source: str = "here"


def writer(directory: Path, *, rows: int = 18, broken: tuple[int, ...] = (), **request: Any) -> CacheWriter:
    """Row i has ``square`` ``[2]`` and ``number``; those among ``broken`` cannot be read."""
    index = NumberIndex(**{"rows": rows, "shard_size": 4, **request})

    def encode(numbers: list[int], accelerator: Any, advance: Callable[[int], object]) -> Iterator[Any]:
        for number in numbers:
            kept = torch.tensor([i for i in index.rows_of(number) if i not in broken], dtype=torch.int64)
            square = (kept.float().square() * index.factor)[:, None].expand(-1, 2)
            names = [f"row {i}" for i in index.rows_of(number) if i in broken]
            advance(len(index.rows_of(number)))
            yield number, {"square": square, "number": kept}, names

    return CacheWriter(directory, index, encode, "squaring", "--output", ("source",))


def write(directory: Path, **options: Any) -> tuple[Any, int, bool]:
    return writer(directory, **options).write(device="cpu")


def start(directory: Path, die_at: int) -> Any:
    """Write in a process of its own, killed while it writes its file number ``die_at``."""
    process = _CONTEXT.Process(target=_write, args=(directory, die_at))
    process.start()
    return process


def _write(directory: Path, die_at: int) -> None:
    plain, calls = shard_cache.file_digest, []

    def file_digest(path: Path) -> str:
        # The file has its bytes and its name, and no record yet.
        calls.append(path)
        if len(calls) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        return plain(path)

    shard_cache.file_digest = file_digest
    write(directory)

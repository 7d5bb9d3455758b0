"""Encoded captions of a data set, kept in files: every caption goes through the text encoders once, for all runs.

====================================  ==================================================================================
``index.json``                        :class:`TextIndex`: of what, by which encoders, and the shards
``text-00000.safetensors``, ...       ``states`` ``[n, L, D]`` and, for Stable Diffusion XL, ``pooled`` ``[n, P]``
====================================  ==================================================================================

Row 0 is that of guidance without a prompt. Numbers are float16, or float32 where one is beyond that.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..._files import replaced, write_text
from ..core.config import from_mapping, to_mapping
from ..core.devices import make_accelerator
from ..core.errors import UsageError, require
from ..core.loop import connected
from ..core.progress import progress_bar
from ..diffusion.autoencoder import weights_digest
from ..diffusion.latents import file_digest
from .conditioning import Conditioning, encode_nothing, encode_prompts, encoders_on

FORMAT = 1
INDEX = "index.json"
_BATCH = 64


@dataclass(frozen=True)
class TextShard:
    """A file of encoded captions."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class TextIndex:
    """``index.json``."""

    format: int
    encoders: str
    """A digest of the text encoders' weights, and of what else decides what they say."""
    captions: str
    """A digest of all captions in their order."""
    rows: int
    shard_size: int
    shards: list[TextShard] = field(default_factory=list)


class TextTable:
    """Encoded captions of images, read from memory-mapped files.

    Args:
        directory: Where they are.
        index: What they are of.
        counts: Captions of each image, by its place in the data set.
    """

    def __init__(self, directory: Path, index: TextIndex, counts: Sequence[int]) -> None:
        self.directory = directory
        self.index = index
        self.counts = torch.tensor(counts)
        # Row 0 is nothing.
        self.first = torch.cat([torch.ones(1, dtype=torch.int64), 1 + self.counts.cumsum(0)])
        self._ends = list(itertools.accumulate(shard.rows for shard in index.shards))
        self._opened: dict[int, Any] = {}
        self._kept: dict[int, Conditioning] = {}

    def drawn(self, images: Tensor, dropout: float) -> Tensor:
        """A row for each image, drawn from PyTorch's global generator: one of its captions, or 0 for none.

        Args:
            images: Places in the data set, ``[B]``.
            dropout: Probability of no caption.
        """
        images = images.cpu()
        chosen = (torch.rand(len(images)) * self.counts[images]).long()
        dropped = torch.rand(len(images)) < dropout
        return torch.where(dropped, 0, self.first[images] + chosen)

    def leading(self, images: Tensor) -> Tensor:
        """The row of each image's first caption."""
        return self.first[images.cpu()]

    def read(self, rows: Tensor) -> Conditioning:
        """The encoded captions of some rows, float32 on the CPU."""
        found = [self._row(row) for row in rows.tolist()]
        return Conditioning.cat(found)

    def _row(self, row: int) -> Conditioning:
        if row in self._kept:
            return self._kept[row]
        number = bisect.bisect_right(self._ends, row)
        at = row - (self._ends[number - 1] if number else 0)
        if number not in self._opened:
            path = self.directory / self.index.shards[number].file
            self._opened[number] = require("safetensors").safe_open(path, framework="pt")
        shard = self._opened[number]
        names = list(shard.keys())
        pooled = shard.get_slice("pooled")[at : at + 1].float() if "pooled" in names else None
        found = Conditioning(shard.get_slice("states")[at : at + 1].float(), pooled)
        if row == 0:  # the one that every batch asks for
            self._kept[row] = found
        return found


def cache_text(
    pipeline: Any,
    captions: Sequence[Sequence[str]],
    directory: Path,
    *,
    shard_size: int = 4096,
    device: str = "auto",
    console: Console | None = None,
) -> TextTable:
    """Encode captions once. Killed and called again, it goes on after the last whole shard.

    Started by ``torchrun``, process i of N makes every N-th shard.

    Args:
        pipeline: With the text encoders; they stay where they are put.
        captions: Of each image one or more.
        directory: New, empty, or begun with the same captions and encoders.
        shard_size: Rows in a file.
        device: ``"auto"`` takes a GPU if there is one, ``"cpu"`` none.
        console: Where to draw a bar.

    Raises:
        UsageError: the directory holds those of other captions or encoders, or a state is not finite.
    """
    texts = ["", *(caption for some in captions for caption in some)]
    asked = TextIndex(
        format=FORMAT,
        encoders=_encoders_digest(pipeline),
        captions=_captions_digest(captions),
        rows=len(texts),
        shard_size=shard_size,
    )
    return connected(
        lambda: _cache(pipeline, texts, [len(some) for some in captions], directory, asked, device, console)
    )


def _cache(
    pipeline: Any,
    texts: list[str],
    counts: list[int],
    directory: Path,
    asked: TextIndex,
    device: str,
    console: Console | None,
) -> TextTable:
    accelerator = make_accelerator(device=device)
    known = _begun(directory, asked)
    accelerator.wait_for_everyone()  # all have looked before one writes
    if accelerator.is_main_process:
        _begin(directory, asked)
    accelerator.wait_for_everyone()
    shards = -(-len(texts) // asked.shard_size)
    own = range(accelerator.process_index, shards, accelerator.num_processes)
    missing = [number for number in own if not _whole(directory, known.get(number))]
    if missing:
        total = sum(len(range(*_bounds(number, asked))) for number in missing)
        bar = progress_bar(console if accelerator.is_main_process else None, "encoding captions", total)
        with encoders_on(pipeline, accelerator.device), bar as advance:
            for number in missing:
                _write(pipeline, texts, number, directory, asked, advance)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # Also where all were there: a process that was killed may have made the last of them, and not come to this.
        found = [_record(directory, number) for number in range(shards)]
        write_text(directory / INDEX, json.dumps(to_mapping(replace(asked, shards=found)), indent=1) + "\n")
        for number in range(shards):
            _record_path(directory, number).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return TextTable(directory, _read_index(directory) or asked, counts)


def _begun(directory: Path, asked: TextIndex) -> dict[int, TextShard]:
    """The shards that are known, or a refusal to take over another's directory."""
    begun = _read_index(directory)
    if begun is not None:
        for key in ("encoders", "captions", "rows", "shard_size"):
            if getattr(begun, key) != getattr(asked, key):
                raise UsageError(
                    f"{str(directory)!r} holds encoded captions of other {key}; name another data.cache, or remove it."
                )
    known = dict(enumerate(begun.shards)) if begun is not None else {}
    for path in directory.glob("text-*.json"):
        number = int(path.stem.rpartition("-")[2])
        known[number] = _record(directory, number)
    return known


def _begin(directory: Path, asked: TextIndex) -> None:
    if _read_index(directory) is None:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / INDEX, json.dumps(to_mapping(asked), indent=1) + "\n")


def _read_index(directory: Path) -> TextIndex | None:
    path = directory / INDEX
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{str(path)!r} cannot be read as an index of encoded captions: {error!r}.") from None
    if version != FORMAT:
        raise UsageError(f"{str(path)!r} is of format {version!r}, and this version of gspn reads {FORMAT}; remove it.")
    return from_mapping(TextIndex, values)


def _whole(directory: Path, shard: TextShard | None) -> bool:
    if shard is None:
        return False
    path = directory / shard.file
    return path.is_file() and file_digest(path) == shard.sha256


def _bounds(number: int, index: TextIndex) -> tuple[int, int]:
    return number * index.shard_size, min((number + 1) * index.shard_size, index.rows)


def _record_path(directory: Path, number: int) -> Path:
    return directory / f"text-{number:05d}.json"


def _record(directory: Path, number: int) -> TextShard:
    path = _record_path(directory, number)
    if path.is_file():
        return from_mapping(TextShard, json.loads(path.read_text(encoding="utf-8")))
    begun = _read_index(directory)
    if begun is None or number >= len(begun.shards):
        raise UsageError(f"{str(directory)!r} lacks shard {number}; start again, which makes it.")
    return begun.shards[number]


def _write(pipeline: Any, texts: list[str], number: int, directory: Path, index: TextIndex, advance: Any) -> None:
    from safetensors.torch import save_file

    begin, end = _bounds(number, index)
    # Off the device at once: a shard of long captions is gigabytes.
    parts = [encode_nothing(pipeline).to("cpu", torch.float32)] if begin == 0 else []
    for first in range(max(begin, 1), end, _BATCH):
        some = texts[first : min(first + _BATCH, end)]
        parts.append(encode_prompts(pipeline, some).to("cpu", torch.float32))
        advance(len(some))
    whole = Conditioning.cat(parts)
    tensors = {"states": whole.states} | ({} if whole.pooled is None else {"pooled": whole.pooled})
    for name, value in tensors.items():
        rows = (~value.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if rows:
            raise UsageError(
                f"the caption {texts[begin + rows[0]]!r} has {name} that are not finite; load the pipeline in float32."
            )
    halves = {name: value.half() for name, value in tensors.items()}
    if all(bool(value.isfinite().all()) for value in halves.values()):
        tensors = halves
    path = directory / f"text-{number:05d}.safetensors"
    with replaced(path) as part:
        save_file({name: value.contiguous() for name, value in tensors.items()}, part)
        digest = file_digest(part)
    write_text(
        _record_path(directory, number), json.dumps(to_mapping(TextShard(path.name, end - begin, digest))) + "\n"
    )


def _encoders_digest(pipeline: Any) -> str:
    found = hashlib.sha256()
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipeline, name, None)
        found.update(b"none" if encoder is None else weights_digest(encoder).encode())
        use_mask = None if encoder is None else getattr(encoder.config, "use_attention_mask", None)
        found.update(json.dumps(use_mask).encode())
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is not None:
            found.update(json.dumps([type(tokenizer).__name__, tokenizer.model_max_length, len(tokenizer)]).encode())
    found.update(json.dumps(bool(pipeline.config.get("force_zeros_for_empty_prompt", False))).encode())
    return found.hexdigest()


def _captions_digest(captions: Sequence[Sequence[str]]) -> str:
    found = hashlib.sha256()
    for some in captions:
        found.update(json.dumps(list(some)).encode())
    return found.hexdigest()

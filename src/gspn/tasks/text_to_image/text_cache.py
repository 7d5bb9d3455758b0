"""Encoded captions of a data set, kept in files: the text encoders see every caption once, for all runs.

It is a cache of shards (:mod:`..diffusion.shard_cache`) with the tensors ``states`` ``[n, L, D]`` and, for Stable
Diffusion XL, ``pooled`` ``[n, P]``. Row 0 is that of guidance without a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor

from ..._errors import UsageError
from ..diffusion.digests import digest, weights_digest
from ..diffusion.shard_cache import CacheIndex, CacheWriter, ShardReader
from .conditioning import Conditioning, encode_nothing, encode_prompts, encoders_on

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class TextIndex(CacheIndex):
    """``index.json`` of encoded captions."""

    NAME: ClassVar[str] = "text"

    encoders: str
    """A digest of the text encoders' weights, and of everything else that their output depends on."""
    captions: str
    """A digest of all captions in their order."""


class TextTable(ShardReader[TextIndex]):
    """Encoded captions of images, read from memory-mapped files.

    Args:
        directory: Of the files.
        index: Of the directory.
        counts: How many captions each image has, in the order of the data set.
    """

    def __init__(self, directory: Path, index: TextIndex, counts: Sequence[int]) -> None:
        super().__init__(directory, index, "start the run again")
        self.counts = torch.tensor(counts)
        # Row 0 stands for no caption.
        self.first = torch.cat([torch.ones(1, dtype=torch.int64), 1 + self.counts.cumsum(0)])
        self._nothing: Conditioning | None = None

    def sample_rows(self, images: Tensor, dropout: float) -> Tensor:
        """Sample one caption's row for each image, or row 0 for none, by PyTorch's global generator.

        ``images`` are indices in the data set, ``[B]``; ``dropout`` is the probability of no caption.
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
        return Conditioning.cat([self._row(row) for row in rows.tolist()])

    def _row(self, row: int) -> Conditioning:
        if row == 0 and self._nothing is not None:
            return self._nothing
        number, at = self.locate(row)
        shard = self.opened(number)
        names = [name for name in ("states", "pooled") if name in list(shard.keys())]
        caption = Conditioning(*(self.finite(number, shard.get_slice(name)[at : at + 1]).float() for name in names))
        if row == 0:  # every batch reads it
            self._nothing = caption
        return caption


def cache_text(
    pipeline: Any, captions: Sequence[Sequence[str]], directory: Path, *, shard_size: int = 4096, device: str = "auto",
    console: Console | None = None,
) -> TextTable:  # fmt: skip
    """Encode captions once; see :class:`~gspn.tasks.diffusion.shard_cache.CacheWriter` for what a killed call leaves.

    Args:
        pipeline: Its text encoders encode.
        captions: One or more of each image.
        directory: New, empty, or begun with the same captions and encoders.
        shard_size: Rows in a file.
        device: ``"auto"`` uses a GPU if there is one, ``"cpu"`` does not.
        console: Where to show progress.

    Raises:
        UsageError: The directory belongs to other captions or encoders, or a state is not finite.
    """
    texts = ["", *(caption for some in captions for caption in some)]
    encoders, digested = _encoders_digest(pipeline), digest(list(some) for some in captions)
    request = TextIndex(rows=len(texts), shard_size=shard_size, encoders=encoders, captions=digested)

    def encode(numbers: list[int], accelerator: Any, advance: Callable[[int], object]) -> Iterator[Any]:
        with encoders_on(pipeline, accelerator.device):
            for number in numbers:
                yield number, _encode(pipeline, texts, request.rows_of(number), advance), []

    writer = CacheWriter(directory, request, encode, "encoding captions", "data.cache")
    index, _, _ = writer.write(device=device, console=console)
    return TextTable(directory, index, [len(some) for some in captions])


def _encode(pipeline: Any, texts: list[str], rows: range, advance: Callable[[int], object]) -> dict[str, Tensor]:
    # Each part leaves the device at once: a shard of long captions is gigabytes.
    parts = [encode_nothing(pipeline).to("cpu", torch.float32)] if rows.start == 0 else []
    for first in range(max(rows.start, 1), rows.stop, _BATCH):
        some = texts[first : min(first + _BATCH, rows.stop)]
        parts.append(encode_prompts(pipeline, some).to("cpu", torch.float32))
        advance(len(some))
    whole = Conditioning.cat(parts)
    tensors = {"states": whole.states} | ({} if whole.pooled is None else {"pooled": whole.pooled})
    for name, value in tensors.items():
        wrong = (~value.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if wrong:
            raise UsageError(
                f"the caption {texts[rows[wrong[0]]]!r} has {name} that are not finite; load the pipeline in float32."
            )
    return tensors


def _encoders_digest(pipeline: Any) -> str:
    parts: list[Any] = []
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipeline, name, None)
        parts.append(b"none" if encoder is None else weights_digest(encoder).encode())
        parts.append(None if encoder is None else getattr(encoder.config, "use_attention_mask", None))
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is not None:
            parts.append([type(tokenizer).__name__, tokenizer.model_max_length, len(tokenizer)])
    parts.append(bool(pipeline.config.get("force_zeros_for_empty_prompt", False)))
    return digest(parts)

"""Images to the posteriors of an autoencoder, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..core.errors import UsageError, require
from ..core.loaders import make_loader
from .latents import LatentIndex


class ShardBatches(Sampler[list[int]]):
    """The batches of some shards in turn.

    None reaches into another shard: what a shard's numbers are rounded to does not depend on where a call began.

    Args:
        numbers: Of the shards.
        images: Of the data set.
        shard_size: Images of a shard; the last has what is left.
        batch_size: Images of a batch; the last of a shard has what is left.

    Example:
        >>> list(ShardBatches([0, 2], images=11, shard_size=5, batch_size=3))
        [[0, 1, 2], [3, 4], [10]]
    """

    def __init__(self, numbers: list[int], images: int, shard_size: int, batch_size: int) -> None:
        self.numbers = numbers
        self.images = images
        self.shard_size = shard_size
        self.batch_size = batch_size

    def of(self, number: int) -> list[list[int]]:
        """The batches of one shard: indices of the data set."""
        end = min((number + 1) * self.shard_size, self.images)
        begins = range(number * self.shard_size, end, self.batch_size)
        return [list(range(begin, min(begin + self.batch_size, end))) for begin in begins]

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.numbers:
            yield from self.of(number)

    def __len__(self) -> int:
        return sum(len(self.of(number)) for number in self.numbers)


class ShardEncoder:
    """Encodes the images of shards.

    Args:
        index: What is asked for.
        vae: The autoencoder, on its device.
        images: A data set of (image ``[channels, size, size]`` in [-1, 1], label).
        accelerator: Of this process.
        batch_size: Images at a time.
        workers: Processes that load images.
    """

    def __init__(
        self, index: LatentIndex, vae: Any, images: Any, accelerator: Any, batch_size: int, workers: int
    ) -> None:
        self.index = index
        self.vae = vae
        self.images = require("gspn.data").SkipBroken(images, training=False)
        self.accelerator = accelerator
        self.batch_size = batch_size
        self.workers = workers

    def count(self, numbers: list[int]) -> int:
        """Images of some shards, broken ones included."""
        return sum(len(indices) for indices in self._batches(numbers))

    def shards(
        self, numbers: list[int], advance: Callable[[int], object]
    ) -> Iterator[tuple[int, dict[str, Tensor], list[str]]]:
        """For each shard its number, its tensors, and the names of images that could not be read.

        The tensors are ``mean`` and ``std`` ``[n, V, C, h, w]`` float32, ``label`` and ``index`` ``[n]`` int64.

        Raises:
            UsageError: a latent is not finite or of another shape, an image has no class, or none can be read.
        """
        if not numbers:
            return
        sampler = self._batches(numbers)
        batches = iter(make_loader(self.images, sampler, self.workers, self.accelerator.device.type == "cuda"))
        for number in numbers:
            parts: list[dict[str, Tensor]] = []
            broken: list[str] = []
            for indices in sampler.of(number):
                pixels, labels, unread = self._next(batches)
                broken += [self.images.filename(i) for i in unread.tolist() if i >= 0]
                mean, std = self._encoded(pixels)  # [B, V, C, h, w]
                found = {"mean": mean, "std": std, "label": labels, "index": torch.tensor(indices)}
                # In the place of an unread one there is another image, which has its own place.
                found = {name: value[unread < 0] for name, value in found.items()}
                self._check(found)
                parts.append(found)
                advance(len(indices))
            yield number, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, broken

    def _batches(self, numbers: list[int]) -> ShardBatches:
        return ShardBatches(numbers, self.index.data.images, self.index.shard_size, self.batch_size)

    def _next(self, batches: Iterator[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        try:
            return next(batches)
        except RuntimeError as error:
            # SkipBroken's word for a folder that is not there any more; from a worker it comes with its traceback.
            if "images in a row are broken" not in str(error):
                raise
            line = str(error).strip().splitlines()[-1].removeprefix("RuntimeError: ")
            raise UsageError(f"data {self.index.data.name!r}: {line}. See to them and start again.") from None

    @torch.inference_mode()
    def _encoded(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``[B, V, C, h, w]``, float32, of images ``[B, channels, size, size]``."""
        means, deviations = [], []
        for view in (pixels, pixels.flip(-1))[: self.index.views]:
            with self.accelerator.autocast():
                posterior = self.vae.encode(view.to(self.accelerator.device)).latent_dist
            means.append(posterior.mean.float().cpu())
            deviations.append((posterior.logvar.float() / 2).exp().cpu())
        return torch.stack(means, dim=1), torch.stack(deviations, dim=1)

    def _check(self, found: dict[str, Tensor]) -> None:
        index, classes = self.index, len(self.index.data.classes)
        finite = (found["mean"].isfinite() & found["std"].isfinite()).flatten(1).all(1)
        classed = (found["label"] >= 0) & ((found["label"] < classes) | (classes == 0))
        for fine, what in (
            (finite, f"a latent that is not finite in {index.precision}; use --precision fp32, or bf16"),
            (classed, f"no class among the {classes} of the data; leave it out"),
        ):
            if not fine.all():
                name = self.images.filename(int(found["index"][~fine][0]))
                raise UsageError(f"{name} of {index.data.name!r} has {what}.")
        shape = tuple(found["mean"].shape[2:])
        if shape != index.shape:
            raise UsageError(
                f"an image of {index.data.size} pixels has latents {list(shape)} and not {list(index.shape)}; use an "
                "autoencoder that halves a side with each of its blocks but the last."
            )

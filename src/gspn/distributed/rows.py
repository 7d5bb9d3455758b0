"""``ImageRows``: which rows of an image, and of its maps, each process has."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..nn.options import check_options
from ..ops import DIRECTIONS, Direction, propagate
from .exchange import Group, exchange, naming_lost_process, start, total

_Interval = tuple[int, int]


class Map(NamedTuple):
    """A map of the image: process r has the rows from ``starts[r]`` to before ``starts[r + 1]``."""

    starts: tuple[int, ...]
    width: int

    def rows(self, rank: int) -> int:
        """How many rows a process has."""
        return self.starts[rank + 1] - self.starts[rank]


class ImageRows:
    """The rows of one image over the processes of a group, for images whose maps do not fit one device.

    Scans along columns need all rows. But a channel's scans do not depend on the others' channels, so
    :meth:`propagate` sends each process all rows of some channels, and the results back. For B images of N pixels, C
    channels and a proxy of S, each of R processes sends::

        2 B C N (R - 1) / R^2  +  B S N (R - 1) / R        x and the result, and the proxy, of which each has all

    numbers. A convolution receives the few rows that it needs of the neighbours; a norm over the map, sums. Rows are on
    their way while the proxy, or the rows that need no others, are computed. The results are those of the whole image
    but for rounding, in the dtype of the input.

    Every exchange has its true derivative. So if each process computes the same loss of the whole image, such as by
    :meth:`mean`, the **average** of the gradients over the processes is the gradient of the whole image. That is what
    :class:`torch.nn.parallel.DistributedDataParallel` takes, over the processes of an image and over those of a batch
    alike.

    Args:
        height: Rows of the whole image.
        width: Its columns, of which each process has all.
        multiple: The rows of a process are a multiple of it, but for the last one's: such as a model's patch.
        group: The processes that share the image; None for all.

    Raises:
        ValueError: A number is not an integer of at least 1; there are fewer rows, or fewer multiples, than processes;
            or this process is not in the group.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from gspn.distributed import ImageRows
        >>> from gspn.nn import GSPNMixer
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # usually by torchrun
        >>> rows, mixer = ImageRows(24, 16), GSPNMixer(8)
        >>> with rows.applied(mixer):
        ...     rows.gather(mixer(rows.take(torch.randn(2, 8, 24, 16)))).shape
        torch.Size([2, 8, 24, 16])
        >>> dist.destroy_process_group()
    """

    def __init__(self, height: int, width: int, *, multiple: int = 1, group: Group = None) -> None:
        check_options("count", height=height, width=width, multiple=multiple)
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in {group=}; pass the group of its own image.")
        self._multiple = multiple
        parts = math.ceil(height / multiple)
        starts = [parts * r // self.count * multiple for r in range(self.count)]
        self._maps: list[Map] = []
        self.add(Map((*starts, height), width))

    # --- Maps ---

    def add(self, of: Map) -> None:
        """Make a map known, so that tensors of its size are known to be its rows.

        Raises:
            ValueError: A process would have no row of it, or could not tell it from another.
        """
        if of in self._maps:
            return
        for rank in range(self.count):
            if of.rows(rank) < 1:
                lines = self._multiple * (round(self._maps[0].starts[-1] / of.starts[-1]) if self._maps else 1)
                raise ValueError(
                    f"a map of {of.starts[-1]}x{of.width} leaves rank {rank} of {self.count} no row; use fewer "
                    f"processes, or an image of at least {self.count} x {lines} = {self.count * lines} rows."
                )
            for other in self._maps:
                if (other.rows(rank), other.width) == (of.rows(rank), of.width):
                    raise ValueError(
                        f"rank {rank} of {self.count} has {of.rows(rank)}x{of.width} of a map of {of.starts[-1]} rows, "
                        f"and of one of {other.starts[-1]}: it cannot tell them apart; use fewer processes."
                    )
        self._maps.append(of)

    def map_of(self, x: Tensor) -> Map:
        """The map whose rows a tensor ``[B, C, rows, W]`` has.

        Raises:
            ValueError: There is none.
        """
        of = self.known(*x.shape[2:]) if x.dim() == 4 else None
        if of is not None:
            return of
        known = ", ".join(f"{one.rows(self.rank)}x{one.width}" for one in self._maps)
        raise ValueError(
            f"rank {self.rank} of {self.count}: {tuple(x.shape)} is not a part of this image, of whose maps the rank "
            f"has {known}; pass what ImageRows.take returns."
        )

    def map_of_tokens(self, x: Tensor) -> Map:
        """The map whose rows tokens ``[B, rows W, C]`` are, in row-major order.

        Raises:
            ValueError: There is none, or more than one.
        """
        matching = [one for one in self._maps if x.dim() == 3 and x.shape[1] == one.rows(self.rank) * one.width]
        if len(matching) != 1:
            raise ValueError(
                f"rank {self.rank} of {self.count}: {tuple(x.shape)} are the tokens of {len(matching)} maps of this "
                "image; it has to be one."
            )
        return matching[0]

    def known(self, rows: int, width: int) -> Map | None:
        """The map of which this process has so many rows of a width, or None."""
        return next((one for one in self._maps if (one.rows(self.rank), one.width) == (rows, width)), None)

    def take(self, image: Tensor) -> Tensor:
        """The rows that this process has of a whole image ``[B, C, H, W]``.

        Raises:
            ValueError: It has another height or width.
        """
        of = self._maps[0]
        if image.dim() != 4 or tuple(image.shape[2:]) != (of.starts[-1], of.width):
            raise ValueError(f"{tuple(image.shape)=}: these are the rows of images of {of.starts[-1]}x{of.width}.")
        return image[:, :, of.starts[self.rank] : of.starts[self.rank + 1]]

    def gather(self, x: Tensor) -> Tensor:
        """The whole map ``[B, C, H, W]`` on every process, of the rows of each."""
        return self._start_gather(x)()

    def _start_gather(self, x: Tensor) -> Callable[[], Tensor]:
        of = self.map_of(x)
        return self.start_between(x, of, [(0, of.starts[-1])] * self.count)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a map over all its pixels, batch entries and channels: the same on every process."""
        of = self.map_of(x)
        return total(x.sum(), self.group) / (x.shape[0] * x.shape[1] * of.starts[-1] * of.width)

    def between(self, x: Tensor, of: Map, requested: Sequence[_Interval]) -> Tensor:
        """Rows of a map, whose rows are ``x``: rank r gets those of the interval ``requested[r]``."""
        return self.start_between(x, of, requested)()

    def start_between(self, x: Tensor, of: Map, requested: Sequence[_Interval]) -> Callable[[], Tensor]:
        """:meth:`between`, begun: the function that is returned waits for the rows."""
        here, after = self.interval(of)
        low, high = _overlap((here, after), requested[self.rank])
        finish = self.start_around(x, of, requested)

        def whole() -> Tensor:
            above, below = finish()
            own = x[:, :, low - here : high - here]
            return torch.cat([*above, own, *below], dim=2) if above or below else own

        return whole

    def start_around(
        self, x: Tensor, of: Map, requested: Sequence[_Interval]
    ) -> Callable[[], tuple[list[Tensor], list[Tensor]]]:
        """Begin an exchange; the function that is returned waits for the rows of others, those above and those below.

        They are of the interval ``requested[r]`` on rank r, but for its own. Nothing is exchanged if nobody lacks any.
        """
        intervals = [self.interval(of, rank) for rank in range(self.count)]
        if all(low <= first and last <= high for (low, high), (first, last) in zip(intervals, requested, strict=True)):
            return lambda: ([], [])
        here, _ = intervals[self.rank]
        parts, shapes = [], []
        for rank, interval in enumerate(intervals):
            sent = _overlap(intervals[self.rank], requested[rank]) if rank != self.rank else (here, here)
            parts.append(x[:, :, sent[0] - here : sent[1] - here])
            low, high = _overlap(interval, requested[self.rank]) if rank != self.rank else (here, here)
            shapes.append((*x.shape[:2], high - low, x.shape[3]))
        finish = start(parts, shapes, self.group)

        def around() -> tuple[list[Tensor], list[Tensor]]:
            received = finish()
            return received[: self.rank], received[self.rank + 1 :]

        return around

    def interval(self, of: Map, rank: int | None = None) -> _Interval:
        """The rows of a map that a process has, this one by default."""
        rank = self.rank if rank is None else rank
        return of.starts[rank], of.starts[rank + 1]

    # --- Operators ---

    def propagate(
        self, x: Tensor, proxy: Tensor | Callable[[Tensor], Tensor], tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor,
        skip_proj: Tensor | None = None, merge: Tensor | None = None, *, directions: Sequence[Direction] = DIRECTIONS,
        segment: int | None = None, impl: str = "auto",
    ) -> Tensor:  # fmt: skip
        """:func:`gspn.propagate` over the whole map; ``x [B, C, rows, W]`` and ``proxy [B, S, rows, W]`` are its rows.

        ``proxy`` may also be a function from x to it, which is then computed while x is sent.

        Raises:
            ValueError: There are fewer channels than processes; or as :meth:`map_of`.
        """
        of, channels = self.map_of(x), x.shape[1]
        if channels < self.count:
            raise ValueError(f"{channels} channels for {self.count} processes: each needs one; use fewer processes.")
        bounds = [channels * rank // self.count for rank in range(self.count + 1)]
        some = slice(bounds[self.rank], bounds[self.rank + 1])
        heights = [of.rows(rank) for rank in range(self.count)]
        batch, width = x.shape[0], of.width
        finish = start(
            [x[:, low:high] for low, high in itertools.pairwise(bounds)],
            [(batch, some.stop - some.start, height, width) for height in heights], self.group,
        )  # fmt: skip
        finish_proxy = self._start_gather(proxy if isinstance(proxy, Tensor) else proxy(x))
        columns = torch.cat(finish(), dim=2)  # [B, C / R, H, W]
        y = propagate(
            columns, finish_proxy(), _taps_of(tap_proj, some, channels), lam_proj[:, some], u_proj[:, some],
            None if skip_proj is None else skip_proj[:, some], merge, directions=directions, segment=segment, impl=impl,
        )  # fmt: skip
        own = torch.cat(
            exchange(
                list(y.split(heights, dim=2)),
                [(batch, high - low, heights[self.rank], width) for low, high in itertools.pairwise(bounds)],
                self.group,
            ), dim=1,
        )  # fmt: skip
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return own.contiguous(memory_format=torch.channels_last) if last else own

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Let a model take and give rows of the image, until the block ends.

        That is every network of :mod:`gspn.nn` and :mod:`gspn.models`, and a ``UNet2DConditionModel`` of diffusers with
        a :class:`gspn.diffusers.GSPNAdapter` mounted: ``GSPN2d``, convolutions, up- and downsampling, group and
        response norms, average pooling and drop path compute what they would of the whole map. Self-attention that a
        UNet has left attends to the tokens of all processes. What a pooling returns, and all after it, is the same on
        every process. What a model draws at random besides, such as classes to drop, is so where the
        processes of an image have the same random state. The block has to contain the backward pass if the model
        recomputes what it did not keep, for checkpointed blocks.

        Each call of the model first compares the batch, channels and dtype of its image over the processes.

        Raises:
            NotImplementedError: The model has a module that is not known to treat each pixel by itself, or whose
                forward has been replaced, as it is inside such a block.
            TypeError: The model is copied or pickled inside the block.
            ValueError: The model is called, and the processes have other images than one another.
        """
        from .modules import replacement

        changed = {name: (one, replacement(name, one, self)) for name, one in model.named_modules()}
        check = model.register_forward_pre_hook(self._check_alike, with_kwargs=True)
        try:
            for one, forward in changed.values():
                if forward is not None:
                    one.forward = forward
            yield
        finally:
            check.remove()
            for one, forward in changed.values():
                if forward is not None:
                    del one.forward

    def _check_alike(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Processes that send other numbers than the rest expect would wait for one another, or take them for what they
        # are not.
        images = (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.dim() == 4)
        image = next(images, None)
        own = None if image is None else (*image.shape[:2], str(image.dtype).removeprefix("torch."))
        seen: list[Any] = [None] * self.count
        with naming_lost_process(self.group):
            dist.all_gather_object(seen, own, self.group)
        if len(set(seen)) > 1:
            told = "; ".join(
                f"rank {rank} has " + ("no image" if one is None else f"{one[0]} of {one[1]} channels in {one[2]}")
                for rank, one in enumerate(seen)
            )
            raise ValueError(
                f"rank {self.rank} of {self.count}: the processes have other images: {told}. Pass all of them rows "
                "of the same images."
            )


def _overlap(one: _Interval, other: _Interval) -> _Interval:
    low = max(one[0], other[0])
    return low, max(min(one[1], other[1]), low)


def _taps_of(tap_proj: Tensor, some: slice, channels: int) -> Tensor:
    """The rows of ``tap_proj [D, G, 3, S]`` for some channels: of the groups that they are, or of each channel."""
    size = channels // tap_proj.shape[1]
    first, last = some.start // size, (some.stop - 1) // size
    if first == last or (some.start % size == 0 and some.stop % size == 0):
        return tap_proj[:, first : last + 1]
    return tap_proj.repeat_interleave(size, dim=1)[:, some]

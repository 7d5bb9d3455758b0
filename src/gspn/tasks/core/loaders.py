"""Data loaders whose order and random numbers are functions of seed, epoch and index alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils import data as torch_data

from ..._errors import MissingExtraError, UsageError, require
from ..._files import printable
from .seeding import derived_seed

if TYPE_CHECKING:
    from .sections import ImageData

_SHOWN = 8  # names of classes
_STOPPED = "DataLoader worker (pid"
_AGAIN = "start again; a training continues with --resume"


@dataclass(eq=False)
class UpdateBatches(torch_data.Sampler[list[Any]]):
    """The batches of one process in the order of the updates, from any update of any epoch on.

    Each epoch is a permutation that depends on the seed and the epoch alone. An update takes the next
    ``batch_size * accumulate * processes`` images of it, whichever process they go to. The remainder at the end of an
    epoch is skipped; other epochs see those images.

    A batch is a list of indices. With ``sizes``, which maps a size to the number of images in a batch of it, a batch is
    a list of (index, size). Each update has one size, which depends on the seed, the epoch and the update alone, so it
    is the same in all processes. It takes the first of its images and skips the others.

    Raises:
        UsageError: there are fewer images than one update takes.

    Example:
        >>> whole = UpdateBatches(10, batch_size=4, accumulate=1, processes=1, process=0, seed=0)
        >>> halves = [UpdateBatches(10, batch_size=2, accumulate=1, processes=2, process=i, seed=0) for i in range(2)]
        >>> list(whole) == [a + b for a, b in zip(*halves)]
        True
    """

    images: int
    _: KW_ONLY
    batch_size: int
    accumulate: int
    processes: int
    process: int
    seed: int
    sizes: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.images_per_update = self.batch_size * self.accumulate * self.processes
        self.updates = self.images // self.images_per_update
        if self.updates == 0:
            raise UsageError(
                f"one update takes {self.images_per_update} images (batch size {self.batch_size}, accumulate "
                f"{self.accumulate}, {self.processes} processes) and there are {self.images}; lower data.batch_size."
            )
        self.start(0)

    def start(self, epoch: int, update: int = 0) -> None:
        """Start at an update of an epoch; no image before it is loaded."""
        self._epoch, self._first = epoch, update

    def size(self, epoch: int, update: int) -> int:
        """The size of an update's images, where there are ``sizes``."""
        return list(self.sizes)[derived_seed(self.seed, "size", epoch, update) % len(self.sizes)]

    def images_in(self, epoch: int, updates: int) -> int:
        """The images of the first updates of an epoch, over all processes."""
        if not self.sizes:
            return updates * self.images_per_update
        batches = self.accumulate * self.processes
        return batches * sum(self.sizes[self.size(epoch, update)] for update in range(updates))

    def __iter__(self) -> Iterator[list[Any]]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", self._epoch))
        order = torch.randperm(self.images, generator=generator)
        for update in range(self._first, self.updates):
            size = self.size(self._epoch, update) if self.sizes else 0
            images = self.sizes.get(size, self.batch_size)
            for batch in range(self.accumulate):
                begin = update * self.images_per_update + (batch * self.processes + self.process) * images
                indices = order[begin : begin + images].tolist()
                yield [(index, size) for index in indices] if self.sizes else indices

    def __len__(self) -> int:
        return (self.updates - self._first) * self.accumulate


class AtSize(torch_data.Dataset[Any]):
    """The samples of a data set by (index, size); ``set_size`` prepares the data set for a sample of that size."""

    def __init__(self, dataset: Any, set_size: Callable[[int], object]) -> None:
        self.dataset, self.set_size = dataset, set_size

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, size = key
        self.set_size(size)
        return self.dataset[index]


@dataclass(eq=False)
class ShareBatches(torch_data.Sampler[list[int]]):
    """Every ``processes``-th image once, in order, with the same number of batches in each process.

    Where the images do not divide evenly, the last batches of some processes are filled up with images from the start.
    Only the first ``real`` images of a process count.
    """

    images: int
    _: KW_ONLY
    batch_size: int
    processes: int = 1
    process: int = 0

    def __post_init__(self) -> None:
        self.share = -(-self.images // self.processes)
        self.real = len(range(self.process, self.images, self.processes))

    def __iter__(self) -> Iterator[list[int]]:
        own = [position % self.images for position in range(self.process, self.share * self.processes, self.processes)]
        for begin in range(0, self.share, self.batch_size):
            yield own[begin : begin + self.batch_size]

    def __len__(self) -> int:
        return -(-self.share // self.batch_size)


@dataclass
class TrainLoader:
    """Training batches, from any update of any epoch on."""

    loader: torch_data.DataLoader[Any]
    order: UpdateBatches
    seeded: Any
    broken: Any
    """The images that could not be read, a :class:`gspn.data.CorruptImages`."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Names and classes of the images, by :func:`facts_of`."""

    def batches(self, epoch: int, update: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of this process, from an update of an epoch on."""
        self.order.start(epoch, update)
        self.seeded.set_epoch(epoch)
        for images, targets, broken in loaded(self.loader):
            self.broken.add(broken)
            yield images, targets


@dataclass
class EvalLoader:
    """Evaluation batches; the target of an image that does not count is -1.

    A batch is ``(images, targets)``, or ``(images, sizes, targets)`` of images that are padded to one size.
    """

    loader: torch_data.DataLoader[Any]
    share: ShareBatches
    broken: Any
    facts: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        seen = 0
        for *images, targets, broken in loaded(self.loader):
            left = max(self.share.real - seen, 0)
            seen += len(targets)
            targets[left:] = -1
            self.broken.add(broken[:left])
            yield *images, targets

    def __len__(self) -> int:
        return len(self.loader)


def seeded_loader(
    dataset: Any, *, batch_size: int, accumulate: int, seed: int, workers: int, processes: int, process: int, pin: bool,
    sizes: Mapping[int, int] | None = None, transforms: Mapping[int, Any] | None = None,
) -> TrainLoader:  # fmt: skip
    """The training batches of a process, by :class:`UpdateBatches`, from a data set of (input, target).

    The random numbers of the data set's transform depend on seed, epoch and index alone. Another image takes the place
    of one that cannot be read. With ``sizes``, images have a transform for each size; other data sets have a method
    ``set_size``, which says at what size they are read.
    """
    data = require("gspn.data")
    seeded = data.DeterministicAugmentation(data.SkipCorrupt(dataset, training=True), derived_seed(seed, "augment"))
    order = UpdateBatches(
        len(dataset), batch_size=batch_size, accumulate=accumulate, processes=processes, process=process, seed=seed,
        sizes=sizes or {},
    )  # fmt: skip
    source: torch_data.Dataset[Any] = seeded
    if sizes:
        set_size = dataset.set_size if transforms is None else partial(_set_transform, dataset, transforms)
        source = AtSize(seeded, set_size)
    loader = make_loader(source, order, workers, pin)
    return TrainLoader(loader, order, seeded, data.CorruptImages(seeded), facts_of(dataset))


def _set_transform(dataset: Any, transforms: Mapping[int, Any], size: int) -> None:
    dataset.transform = transforms[size]


def share_loader(
    dataset: Any, *, batch_size: int, workers: int, processes: int = 1, process: int = 0, pin: bool = False,
    padded: bool = False,
) -> EvalLoader:  # fmt: skip
    """The batches of a process's share of the data, in order, each image once; ``padded`` if their sizes differ."""
    data = require("gspn.data")
    share = ShareBatches(len(dataset), batch_size=batch_size, processes=processes, process=process)
    whole = data.SkipCorrupt(dataset, training=False)
    return EvalLoader(
        make_loader(whole, share, workers, pin, padded), share, data.CorruptImages(whole), facts_of(dataset)
    )


def open_data(
    name: str, split: str, root: Any = None, /, *, kind: Literal["labelled", "captioned", "mapped"] = "labelled",
    **options: Any,
) -> Any:  # fmt: skip
    """A data set of (PIL image, class index) with ``classes``, or a :class:`gspn.data.CaptionedImages`, or a
    :class:`gspn.data.MappedImages`.

    Raises:
        UsageError: there is no data set of that name, split or directory.
    """
    require("PIL", "timm")
    data = require("gspn.data")
    try:
        opens = {"labelled": data.open_dataset, "captioned": data.open_captions, "mapped": data.open_maps}[kind]
        dataset = opens(name, split, root=root, **options)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise UsageError(f"data {name!r}, split {split!r}: {' '.join(str(error).split())}") from None
    except ImportError as error:
        raise MissingExtraError(str(error)) from None
    if hasattr(dataset, "__iter__") or not hasattr(dataset, "__len__"):
        raise UsageError(
            f"data {name!r} is a stream, which cannot be resumed at an image; open it as files (data.name=folder) or "
            "as hfds/NAME."
        )
    if len(dataset) == 0:
        raise UsageError(f"data {name!r}, split {split!r} has no images.")
    return dataset


def open_splits(data: ImageData) -> tuple[Any, Any]:
    """The training data of a configuration and the held-out data, None without; both have the same classes.

    Raises:
        UsageError: one of them cannot be opened, or they differ in their classes.
    """
    train = open_data(data.name, data.train_split, data.root, **data.options)
    if data.eval_split is None:
        return train, None
    classes, options = class_names(train), dict(data.options)
    if data.name in ("", "folder"):
        options.setdefault("classes", classes)  # a class without held-out images must not shift the others
    held_out = open_data(data.name, data.eval_split, data.root, **options)
    if class_names(held_out) != classes:
        raise UsageError(
            f"data {data.name!r}: split {data.train_split!r} has {len(classes)} classes and {data.eval_split!r} has "
            f"{len(class_names(held_out))} others; name two splits of one data set."
        )
    return train, held_out


def with_classes(name: str, split: str, root: Any, classes: list[str], **options: Any) -> tuple[Any, str | None]:
    """A data set whose targets are indices of ``classes``, by their names, and a warning where names tell nothing.

    A data set that has none of the names, but as many, is matched by position, as it has to be.

    Raises:
        UsageError: it cannot be opened, or has other classes.
    """
    if name in ("", "folder"):
        options.setdefault("classes", classes)  # a class missing in the folder must not shift the others
    dataset = open_data(name, split, root, **options)
    own = class_names(dataset)
    if own == classes:
        return dataset, None
    if set(own) == set(classes):
        return require("gspn.data").Relabelled(dataset, classes), None
    known = set(own) & set(classes)
    if known or len(own) != len(classes):
        unknown = ", ".join(repr(one) for one in own if one not in known)[:200]
        raise UsageError(
            f"the model has {len(classes)} classes and data {name!r} has {len(own)}"
            f"{f', of which the model does not know {unknown}' if unknown else ''}; use the data it was trained on."
        )
    return dataset, (
        f"the classes of data {name!r} ({_some(own)}) and of the model ({_some(classes)}) have no name in common; they "
        "are matched by their positions"
    )


def facts_of(dataset: Any) -> dict[str, Any]:
    """The names and the classes of a data set's images, without pixels, which a resumed run compares."""
    if not hasattr(dataset, "identity"):
        return {}
    classes = [str(one) for one in getattr(dataset, "classes", None) or ()]
    facts: dict[str, Any] = {"files": f"{len(dataset):,} images, {dataset.identity()}"}
    if classes:
        facts["classes"] = classes
    return facts


def _some(names: list[str]) -> str:
    return ", ".join(map(printable, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")


def loaded(loader: Any) -> Iterator[Any]:
    """The batches of a loader.

    Raises:
        UsageError: no image can be read, or a process that loads images has stopped.
    """
    try:
        yield from loader
    except UsageError as error:
        # From a worker it comes with the worker's traceback.
        line = str(error).strip().splitlines()[-1].removeprefix(f"{UsageError.__module__}.UsageError: ")
        raise UsageError(f"{line}. Repair the data and {_AGAIN}.") from None
    except RuntimeError as error:
        if _STOPPED not in str(error):
            raise
        raise UsageError(
            "a process that loads images was killed; often there is not enough memory. Lower the number of workers or "
            f"the batch size, and {_AGAIN}."
        ) from error


def class_names(dataset: Any) -> list[str]:
    """The names of the classes.

    Raises:
        UsageError: the data set has no class names.
    """
    names = getattr(dataset, "classes", None)
    if not names:
        raise UsageError(
            f"{getattr(dataset, 'name', dataset)!r} has no classes; a folder needs a folder of each class."
        )
    return [str(one) for one in names]


def make_loader(
    dataset: torch_data.Dataset[Any], batches: torch_data.Sampler[list[Any]], workers: int, pin: bool,
    padded: bool = False,
) -> torch_data.DataLoader[Any]:  # fmt: skip
    """Batches of (images, targets, broken images), in the order of ``batches``; sizes come after ``padded`` images."""
    data = require("gspn.data")
    return torch_data.DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin,
        collate_fn=data.collate_padded if padded else data.collate,
        # Running workers learn of the next epoch; restarting them would cost seconds per epoch.
        persistent_workers=workers > 0,
    )

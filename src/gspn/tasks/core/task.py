"""The seam between the training loop and a task: the ``Task`` protocol and the ``Context`` that the loop provides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .devices import process_info, to_device
from .loaders import EvalLoader, TrainLoader, seeded_loader, share_loader
from .metrics_table import EpochRow
from .progress import Reporter
from .sections import Configuration
from .seeding import derived_seed, random_state_kept, seed_everything

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image

Config = TypeVar("Config", bound=Configuration)
Row = TypeVar("Row", bound=EpochRow)


@dataclass(frozen=True)
class Setup:
    """The parts of a run that a task makes from its configuration."""

    model: nn.Module
    """On the CPU, or on the context's device."""
    train: TrainLoader
    model_title: str
    """The model in the first line of the output, such as `gspn_pico`."""
    data_title: str
    """The data in the second line."""
    notes: tuple[str, ...] = ()
    """Further lines."""
    evaluation: EvalLoader | None = None
    """The held-out images, if there are any; broken ones among them are reported."""
    num_classes: int = 0
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """Further values that follow from the configuration; saved under ``resolved``. A resumed run must have the same.

    What the images and their classes are is added to it.
    """

    def __post_init__(self) -> None:
        loaders = {"train": self.train, "eval": self.evaluation}
        facts = {f"{name}_{fact}": value for name, one in loaders.items() if one for fact, value in one.facts.items()}
        object.__setattr__(self, "resolved", {**self.resolved, **facts})


@dataclass(frozen=True)
class Resolved:
    """The part of ``resolved`` in a saved configuration that every task has."""

    processes: int
    images_per_update: int
    updates_per_epoch: int
    lr: float
    min_lr: float
    warmup_lr: float
    parameters: int
    num_classes: int
    train_images: int


@dataclass(frozen=True)
class Models:
    """The models to evaluate."""

    raw: nn.Module
    """As it is trained: wrapped by DDP or FSDP in several processes."""
    ema: nn.Module | None
    """With the averaged weights, where an average is kept."""


@dataclass(frozen=True)
class Weights:
    """State dicts of the whole model."""

    raw: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None

    @property
    def averaged(self) -> dict[str, Tensor]:
        """The average where one is kept, else the raw weights; on the CPU."""
        return {key: value.cpu() for key, value in (self.raw if self.ema is None else self.ema).items()}


@dataclass(frozen=True)
class Context:
    """The loop's side of the seam: configuration, devices, processes and progress, for use by the task."""

    config: Configuration
    accelerator: Accelerator
    reporter: Reporter

    @property
    def process_info(self) -> dict[str, Any]:
        """The arguments of data loaders that depend on the process."""
        return process_info(self.accelerator)

    def train_loader(
        self, dataset: Any, transforms: Mapping[int, Any] | None = None, *, multiple: int = 1
    ) -> TrainLoader:
        """The training batches of this process, from a data set of (input, target).

        Where the configuration has ``data.sizes``, ``transforms`` are those of images, by size, and ``multiple``
        divides the number of images in each batch.
        """
        data, optim, run = self.config.data, self.config.optim, self.config.run
        sizes = {size: max(images // multiple, 1) * multiple for size, images in data.images_by_size.items()}
        loading = {"batch_size": data.batch_size, "workers": data.workers, **self.process_info}
        return seeded_loader(
            dataset, accumulate=optim.accumulate, seed=run.seed, sizes=sizes, transforms=transforms, **loading
        )

    def eval_loader(self, dataset: Any, batch_size: int | None = None, workers: int | None = None) -> EvalLoader:
        """The evaluation batches of this process; batch size and workers are those of the training by default."""
        data = self.config.data
        workers = data.workers if workers is None else workers
        return share_loader(dataset, batch_size=batch_size or data.batch_size, workers=workers, **self.process_info)

    @property
    def sharded(self) -> bool:
        """Whether FSDP shards the weights; it may also be switched on by `accelerate launch`."""
        return self.accelerator.distributed_type == "FSDP"

    @property
    def counting_device(self) -> torch.device:
        """The device of float64 sums, which Apple's GPUs do not have."""
        return torch.device("cpu") if self.accelerator.device.type == "mps" else self.accelerator.device

    def sum(self, values: Tensor) -> list[float]:
        """Float64 numbers summed over all processes."""
        return self.accelerator.reduce(values.to(self.counting_device), "sum").tolist()  # type: ignore[union-attr]

    def to_device(self, images: Tensor) -> Tensor:
        """A batch of images on the device, in the model's memory format."""
        return to_device(images, self.accelerator.device, self.config.model.channels_last)

    @torch.no_grad()
    def mean_metrics(
        self, model: nn.Module, loader: Iterable[Any], metrics: Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]
    ) -> dict[str, float]:
        """Means over the images of all processes, of a model in evaluation mode.

        ``metrics`` maps the model, and images and targets on the device, to ``[B]`` numbers by name. Images whose
        target is -1 do not count; ``metrics`` receives 0 for it. The random numbers depend on the seed, the batch and
        the process alone, so they are the same after every epoch.
        """
        training, device = model.training, self.accelerator.device
        model.eval()
        sums: dict[str, Tensor] = {}
        with random_state_kept():
            for i, (images, targets) in enumerate(loader):
                seed_everything(derived_seed(self.config.run.seed, "eval", i, self.accelerator.process_index))
                counts = targets >= 0
                with self.accelerator.autocast():
                    measured = metrics(model, self.to_device(images), targets.clamp(min=0).to(device))
                self.reporter.doing("evaluating")
                for name, values in {"count": torch.ones(len(targets)), **measured}.items():
                    sums[name] = sums.get(name, 0) + values.cpu().double()[counts].sum()
        model.train(training)
        totals = dict(zip(sums, self.sum(torch.stack(list(sums.values()))), strict=True))
        count = max(totals.pop("count"), 1)
        return {name: total / count for name, total in totals.items()}


class Task(Protocol[Config, Row]):
    """A training task: a configuration, the model and data made from it, a loss, metrics, and the files to write.

    :func:`~.loop.fit` trains it. It calls the methods in the order below, in every process unless stated otherwise.
    """

    config: Config
    row_type: type[Row]
    """The type of the rows of ``metrics.csv``."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def setup(self, context: Context) -> Setup:
        """Open the data and build the model, with PyTorch's generators seeded."""
        ...

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """The mean loss of a batch on the device, in an epoch counted from 0; the generators are seeded per batch."""
        ...

    def evaluate(self, models: Models, context: Context) -> dict[str, float | None]:
        """The metrics after an epoch that is evaluated (``run.eval_every``): the columns that ``row_type`` adds."""
        ...

    def score(self, row: Row) -> float | None:
        """The number by which epochs are compared, higher is better; None without one."""
        del row
        return None

    def save(self, weights: Weights, row: Row, output: Path, context: Context, *, best: bool) -> Image.Image | None:
        """Write the model to the run's directory after every epoch; returns samples to show, if any were drawn.

        Called in the first process only. ``best``: the score of the epoch, whose row is ``row``, is the highest so far.
        """
        ...


@dataclass(frozen=True)
class TrainingResult(Generic[Row]):
    """The outcome of a training run."""

    output: Path
    """The run's directory: ``config.yaml``, ``metrics.csv``, ``last``, ``checkpoints`` and what the task adds."""
    last: Row | None
    """The last row of ``metrics.csv``."""
    best_score: float
    """The highest score of an epoch, for tasks that have one, such as top-1 accuracy in percent."""
    best_epoch: int
    """Counted from 1."""
    broken: tuple[str, ...] = ()
    """Names of training images that this process could not read."""
    is_main: bool = True
    """Whether this is the process that writes and prints."""

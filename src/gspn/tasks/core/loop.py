"""The loop of a training run: updates, epochs, checkpoints, and going on after a kill. A task says what is learnt."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from ..._files import write_text
from .checkpoints import CheckpointStore
from .config import flat, read_yaml, to_mapping, write_yaml
from .devices import make_accelerator
from .errors import UsageError, require
from .loaders import TrainLoader
from .optimization import make_optimizer, make_scheduler
from .records import MetricsTable, Reporter, Row, peak_memory_mib
from .sections import Resolved
from .seeding import derived_seed, seed_everything

# Keys that change neither the weights nor the table, and so may differ when a run is resumed.
_FREE = (
    "data.root", "data.latents", "data.cache", "data.workers", "data.eval_batch_size", "model.compile",
    "model.grad_checkpointing",
    "run.output", "run.device", "run.deterministic", "run.checkpoint_every_s", "run.log_every", "run.trackers",
    "data.batch_size", "optim.accumulate",  # their product with the processes is compared instead
    "resolved.processes",  # and a digest of the latents in the place of where they lie
)  # fmt: skip

# In the output directory.
_CHECKPOINTS, _TABLE = "checkpoints", "metrics.csv"

# Updates between two questions to the first process whether a checkpoint is due; each is a message to all others.
_ASK_EVERY = 16


@dataclass
class Position:
    """Where a run is: all that has to be kept besides weights, optimiser and average."""

    epoch: int = 0
    """Epochs completed."""
    update: int = 0
    """Updates completed in the current epoch."""
    loss_sum: float = 0.0
    """Of the current epoch's batches, over all processes."""
    seconds: float = 0.0
    """Spent on the current epoch's updates."""
    broken: int = 0
    """Images of the current epoch that could not be read, over all processes."""


Where = TypeVar("Where", bound=Position)
Result = TypeVar("Result")


def connected(run: Callable[[], Result]) -> Result:
    """Call ``run``; a connection between processes that it opened is closed after it, one that was there stays."""
    before = torch.distributed.is_available() and torch.distributed.is_initialized()
    result = run()
    if not before and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # which accelerate made for this run
    return result


def refuse_existing(output: Path, resume: bool) -> None:
    """Refuse a directory that holds a run which is not to be continued.

    Raises:
        UsageError: it does, or it is a file.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"run.output {str(output)!r} is a file; name a directory.")
    if not resume and (CheckpointStore(output / _CHECKPOINTS).newest() is not None or (output / _TABLE).exists()):
        raise UsageError(
            f"run.output {str(output)!r} holds a run already; continue it with --resume, or name another directory "
            "with --output."
        )


class TrainingRun(Generic[Row, Where]):
    """A training run of a task, in one process or in each of several.

    Every random number is a function of seed, epoch, update and process, so that a run that was killed and resumed ends
    with the weights of the uninterrupted one. A task derives from this class and says what is opened (``_open``), what
    follows from the configuration (``_resolve``), the loss of a batch (``_loss``) and what ends an epoch (``_finish``).

    Args:
        config: The task's configuration: a frozen dataclass with the sections ``data``, ``model``, ``optim``,
            ``schedule``, ``ema``, ``run`` and ``resolved``.
        resume: Continue from the newest whole checkpoint in the output directory.
        console: Where to print.
    """

    row: ClassVar[type[Any]]
    """The type of the table's rows."""
    where: ClassVar[type[Any]] = Position
    """The type of the position."""

    # Of :meth:`_open`.
    train_loader: TrainLoader

    def __init__(self, config: Any, resume: bool, console: Console) -> None:
        self.output: Path = config.run.output
        run = config.run
        self.accelerator = make_accelerator(
            precision=run.precision,
            device=run.device,
            fsdp=run.fsdp,
            deterministic=run.deterministic,
            log_with=list(run.trackers) or None,
            project_dir=run.output,
        )
        # Also where `accelerate launch` was told so.
        self.sharded = self.accelerator.distributed_type == "FSDP"
        self.store = CheckpointStore(self.output / _CHECKPOINTS)
        self.table: MetricsTable[Row] = MetricsTable(self.output / _TABLE, self.row)
        self.main = self.accelerator.is_main_process
        self._check_output(config, resume)

        seed_everything(derived_seed(config.run.seed, "weights"))
        network = self._open(config)
        self.updates = self.train_loader.sampler.updates
        self.config = replace(config, resolved=self._resolve(config, network, self._resolved(config, network)))
        self.resolved: Resolved = self.config.resolved
        self._check_resumed(resume)
        self._prepare(network)

        self._broken_said: dict[int, set[int]] = {}
        self.position: Where = self.where()
        self.lr = 0.0
        """Of the last update, for the layers whose rate is not reduced."""
        if resume:
            self._load()
        self.reporter = Reporter(
            console,
            epochs=config.schedule.epochs,
            updates=self.updates,
            images=self.resolved.images_per_update,
            done=self._step,
            quiet=not self.main,
        )

    # --- What a task says ---------------------------------------------------------------------------------------------

    def _open(self, config: Any) -> nn.Module:
        """Open the data, set ``train_loader``, and return the network, seeded, on the CPU."""
        raise NotImplementedError

    def _classes(self) -> int:
        """The number of classes."""
        raise NotImplementedError

    def _resolve(self, config: Any, network: nn.Module, shared: Resolved) -> Resolved:
        """What follows from the configuration, to be saved with it."""
        del config, network
        return shared

    def _begin(self, epoch: int) -> None:
        """Before an epoch's updates."""

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch on its device; the random state is a function of the update."""
        raise NotImplementedError

    def _finish(self, shared: dict[str, Any], last: bool) -> tuple[Row, list[str], bool]:
        """Evaluate, write the weights; ``shared`` are the figures of :class:`~.records.EpochRow`.

        Returns:
            The row, what to print of it, and whether the epoch is the best so far.
        """
        raise NotImplementedError

    def _broken_records(self) -> list[Any]:
        """The records of images that could not be read."""
        return [self.train_loader.broken]

    def _announcement(self) -> list[str]:
        """Lines that say what is trained on what."""
        raise NotImplementedError

    # --- Setting up ---------------------------------------------------------------------------------------------------

    @property
    def places(self) -> dict[str, Any]:
        """The arguments of loaders that say which process this is."""
        return {
            "processes": self.accelerator.num_processes,
            "process": self.accelerator.process_index,
            "pin": self.accelerator.device.type == "cuda",
        }

    def _check_output(self, config: Any, resume: bool) -> None:
        if config.run.fsdp and not self.sharded:
            raise UsageError(
                "run.fsdp is true, and weights are sharded over several GPUs only; start with "
                "torchrun --nproc-per-node N, or set run.fsdp=false."
            )
        if self.sharded and config.ema.decay is not None:
            raise UsageError(f"ema.decay is {config.ema.decay:g}, and FSDP keeps no whole weights; set ema.decay=null.")
        refuse_existing(self.output, resume)
        # No process looks before all have: the first one writes soon.
        self.accelerator.wait_for_everyone()

    def _resolved(self, config: Any, network: nn.Module) -> Resolved:
        sampler = self.train_loader.sampler
        base = config.optim.lr_base_batch
        scale = 1.0 if base is None else sampler.images_per_update / base
        return Resolved(
            processes=self.accelerator.num_processes,
            images_per_update=sampler.images_per_update,
            updates_per_epoch=self.updates,
            lr=config.optim.lr * scale,
            min_lr=config.schedule.min_lr * scale,
            warmup_lr=config.schedule.warmup_lr * scale,
            parameters=sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad),
            num_classes=self._classes(),
            train_images=sampler.images,
        )

    def _check_resumed(self, resume: bool) -> None:
        """A resumed run is the same run, or it is refused."""
        path = self.output / "config.yaml"
        if resume and path.is_file():
            old = flat(read_yaml(path.read_text(encoding="utf-8"), str(path)))
            new = flat(to_mapping(self.config))
            for key in sorted(old.keys() | new.keys()):
                if key not in _FREE and old.get(key) != new.get(key):
                    raise UsageError(
                        f"{key} is {new.get(key)!r}, and the run in {str(self.output)!r} has {old.get(key)!r}; a "
                        "resumed run keeps it. Leave it out, or start another run with --output."
                    )
        self.accelerator.wait_for_everyone()
        if self.main:
            self.output.mkdir(parents=True, exist_ok=True)
            write_text(path, write_yaml(self.config))

    def _prepare(self, network: nn.Module) -> None:
        config = self.config
        if config.model.channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        network = network.to(self.accelerator.device)
        self.ema = None
        if config.ema.decay is not None:
            self.ema = require("timm.utils").ModelEmaV3(
                network,
                decay=config.ema.decay,
                use_warmup=config.ema.warmup,
                warmup_gamma=config.ema.warmup_gamma,
                warmup_power=config.ema.warmup_power,
            )
            self.accelerator.register_for_checkpointing(self.ema)
        optimizer = make_optimizer(config.optim, network, self.resolved.lr)
        self.scheduler = make_scheduler(config.schedule, optimizer, self.resolved)
        if config.model.compile:
            network.compile()
        self.network = network
        self.model, self.optimizer = self.accelerator.prepare(network, optimizer)

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    @property
    def _step(self) -> int:
        return self.position.epoch * self.updates + self.position.update

    def _load(self) -> None:
        newest = self.store.newest()
        if newest is not None:
            self.position = self.where(**self.store.load(self.accelerator, newest))
            if self.scheduler is not None:
                self.scheduler.step_update(self._step)
        if self.main:
            self.table.forget_after(self._step)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        self.store.save(self.accelerator, self._step, asdict(self.position))

    def _is_checkpoint_due(self, saved: float) -> bool:
        due = time.monotonic() - saved >= self.config.run.checkpoint_every_s
        if self.accelerator.num_processes == 1:
            return due
        if self.position.update % _ASK_EVERY:
            return False
        # The clocks differ, and all have to save the same update.
        answer = torch.tensor([float(due and self.main)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(answer, "sum").item())  # type: ignore[union-attr]

    def weights(self) -> dict[str, Mapping[str, Any]]:
        """The weights, ``raw`` and averaged (``ema``) where an average is kept. Every process calls it."""
        # Under FSDP each has a share.
        found: dict[str, Mapping[str, Any]] = {"raw": self.accelerator.get_state_dict(self.model)}
        if self.ema is not None:
            found["ema"] = self.ema.module.state_dict()
        return found

    # --- The loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last epoch."""
        self._announce()
        try:
            with self._trackers(), self.reporter.running():
                saved = time.monotonic()
                for epoch in range(self.position.epoch, self.config.schedule.epochs):
                    self._train_epoch(epoch, saved)
                    self._end_epoch(epoch)
                    saved = time.monotonic()
        finally:
            self._say_broken()
        self.accelerator.wait_for_everyone()

    def _train_epoch(self, epoch: int, saved: float) -> None:
        position, config = self.position, self.config
        self.model.train()
        self._begin(epoch)
        batches = self.train_loader.batches(epoch, position.update)
        broken_before = position.broken
        # Summed on the device: reading each loss would wait for it.
        total = torch.tensor(position.loss_sum if self.main else 0.0, dtype=torch.float64)
        total = total.to(self.accelerator.device if self.accelerator.device.type != "mps" else "cpu")
        clock = time.perf_counter()
        for update in range(position.update, self.updates):
            loss = self._update(epoch, update, batches)
            total += loss.to(total)
            position.update = update + 1
            now = time.perf_counter()
            position.seconds += now - clock
            clock = now
            self.reporter.updated(epoch, update, loss)
            if self._step % config.run.log_every == 0:
                self._log_update(loss)
            # After an epoch there is one anyway.
            if update + 1 < self.updates and self._is_checkpoint_due(saved):
                position.loss_sum = self.accelerator.reduce(total, "sum").item()  # type: ignore[union-attr]
                total.fill_(position.loss_sum if self.main else 0.0)
                position.broken = self._count_broken(broken_before)
                self._save()
                saved, clock = time.monotonic(), time.perf_counter()
        position.loss_sum = self.accelerator.reduce(total, "sum").item()  # type: ignore[union-attr]
        position.broken = self._count_broken(broken_before)
        position.seconds += time.perf_counter() - clock

    def _update(self, epoch: int, update: int, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """One update from this process's next batches; the mean loss of them, on the device."""
        config, accelerator = self.config, self.accelerator
        accumulate = config.optim.accumulate
        total = torch.zeros((), device=accelerator.device)
        for part in range(accumulate):
            images, targets = next(batches)
            # After loading, which may draw in this process too: what the loss draws begins from here.
            seed_everything(derived_seed(config.run.seed, "update", epoch, update, part, accelerator.process_index))
            images = to_device(images, accelerator.device, config.model.channels_last)
            targets = targets.to(accelerator.device, non_blocking=True)
            # Gradients are exchanged between processes once an update.
            more = part + 1 < accumulate
            with accelerator.no_sync(self.model) if more else contextlib.nullcontext():
                loss = self._loss(images, targets)
                accelerator.backward(loss / accumulate)
            total += loss.detach() / accumulate
        if config.optim.clip_grad is not None:
            accelerator.clip_grad_norm_(self.model.parameters(), config.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr = max(group["lr"] / group.get("lr_scale", 1.0) for group in self.optimizer.param_groups)
        done = epoch * self.updates + update + 1
        if self.scheduler is not None:
            self.scheduler.step_update(done)
        if self.ema is not None:
            self.ema.update(self.network, step=done)
        return total

    def _end_epoch(self, epoch: int) -> None:
        """Evaluate, write the weights, then the row, then the checkpoint: a kill between repeats, and loses nothing."""
        position = self.position
        loss = position.loss_sum / (self.updates * self.accelerator.num_processes)
        self._check_finite(loss)
        shared = {
            "epoch": epoch + 1,
            "step": self._step,
            "lr": self.lr,
            "train_loss": loss,
            "seconds": position.seconds,
            "images_per_second": self.updates * self.resolved.images_per_update / max(position.seconds, 1e-9),
            "peak_memory_mib": peak_memory_mib(self.accelerator.device),
            "broken_images": position.broken,
        }
        row, found, best = self._finish(shared, epoch + 1 == self.config.schedule.epochs)
        if self.main:
            self.table.append(row)
        self.accelerator.log({key: value for key, value in asdict(row).items() if value is not None}, step=row.step)
        position.epoch, position.update = epoch + 1, 0
        position.loss_sum, position.seconds, position.broken = 0.0, 0.0, 0
        self._save()
        self.reporter.epoch(row, found, best)
        self._say_broken()

    # --- Reports ------------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        config, resolved = self.config, self.resolved
        self.reporter.say(
            *self._announcement(),
            f"epochs {config.schedule.epochs}, updates {resolved.updates_per_epoch:,} an epoch, images "
            f"{resolved.images_per_update} an update, {config.optim.name}, lr {resolved.lr:.3g}; writes {self.output}",
        )
        if self._step:
            at = f", update {self.position.update}" if self.position.update else ""
            self.reporter.say(f"resumed after epoch {self.position.epoch}{at}")

    def _place(self) -> str:
        """The device, the processes and the precision in words."""
        device, processes = self.accelerator.device, self.accelerator.num_processes
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return f"{name} ({processes} process{'es' if processes > 1 else ''}, {self.config.run.precision})"

    @contextlib.contextmanager
    def _trackers(self) -> Iterator[None]:
        names = self.config.run.trackers
        if "tensorboard" in names:
            require("tensorboard")
        # What a killed run logged beyond its checkpoint is hidden by what the resumed one logs.
        settings = {"tensorboard": {"purge_step": self._step + 1}} if "tensorboard" in names else {}
        self.accelerator.init_trackers("tensorboard", init_kwargs=settings)
        try:
            yield
        finally:
            # Not end_training, which would also take the processes' connection away.
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _log_update(self, loss: Tensor) -> None:
        value = loss.item()
        self._check_finite(value)
        self.accelerator.log({"update_loss": value, "lr": self.lr}, step=self._step)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise UsageError(
                f"the training loss is {loss} in epoch {self.position.epoch + 1}; lower optim.lr, lengthen "
                "schedule.warmup_epochs or set optim.clip_grad. The checkpoint before is whole."
            )

    def _summed(self, values: Tensor) -> list[float]:
        """The sums over all processes of float64 numbers, which Apple's GPU has not."""
        device = self.accelerator.device if self.accelerator.device.type != "mps" else "cpu"
        return self.accelerator.reduce(values.to(device), "sum").tolist()  # type: ignore[union-attr]

    def _count_broken(self, before: int) -> int:
        """Broken images of this epoch over all processes, ``before`` of them before this process began."""
        found = torch.tensor([len(self.train_loader.broken.epoch)], device=self.accelerator.device)
        return before + int(self.accelerator.reduce(found, "sum").item())  # type: ignore[union-attr]

    def _say_broken(self) -> None:
        for place, record in enumerate(self._broken_records()):
            said = self._broken_said.setdefault(place, set())
            line = record.summary()
            record.epoch.clear()
            # The same ones are not named again after every epoch.
            if line is not None and not said >= record.names.keys():
                said.update(record.names)
                # Each process knows of its own share.
                self.reporter.warn(line)


def to_device(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """The images where and how the network wants them."""
    layout = torch.channels_last if channels_last else torch.preserve_format
    return images.to(device, non_blocking=True, memory_format=layout)

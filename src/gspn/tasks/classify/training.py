"""Training a classifier: :func:`train`."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..checkpoints import CheckpointStore
from ..configs import flat, read_yaml, to_mapping, write_yaml
from ..devices import make_accelerator
from ..errors import UsageError, require
from ..files import write_text
from ..seeding import derived_seed, seed_everything
from .config import Resolved, TrainConfig
from .loaders import class_names, eval_batch_size, eval_loader, open_pair, train_loader
from .network import build_model, count_parameters, resolve_preprocessing, save_config, save_weights
from .optimization import make_optimizer, make_scheduler
from .records import EpochRow, MetricsTable, Reporter, peak_memory_mib
from .steps import Figures, evaluate_batches, make_criterion, make_mixup, to_device

# Keys that change neither the weights nor the table, and so may differ when a run is resumed.
_FREE = (
    "data.root", "data.workers", "data.eval_batch_size", "model.compile", "model.grad_checkpointing",
    "run.output", "run.device", "run.deterministic", "run.checkpoint_every_s", "run.log_every", "run.trackers",
    "data.batch_size", "optim.accumulate",  # their product with the processes is compared instead
)  # fmt: skip

# Updates between two questions to the first process whether a checkpoint is due; each is a message to all others.
_ASK_EVERY = 16


@dataclass(frozen=True)
class TrainResult:
    """What a training run came to.

    Attributes:
        output: The run's directory: ``config.yaml``, ``metrics.csv``, ``best``, ``last``, ``checkpoints``.
        best_top1: Best evaluated accuracy in percent, of the weights or of their average.
        best_epoch: The epoch after which it was reached, counted from 1.
        last: The last row of the table.
        broken: Names of training images that could not be read, as far as this process met them.
        is_main: Whether this is the process that writes and prints.
    """

    output: Path
    best_top1: float
    best_epoch: int
    last: EpochRow | None
    broken: tuple[str, ...] = ()
    is_main: bool = True


@dataclass
class _Position:
    """Where a run is: all that has to be kept besides weights, optimiser and average."""

    epoch: int = 0
    """Epochs completed."""
    update: int = 0
    """Updates completed in the current epoch."""
    loss_sum: float = 0.0
    """Of the current epoch's batches, over all processes."""
    seconds: float = 0.0
    """Spent on the current epoch's updates."""
    best_top1: float = -1.0
    best_epoch: int = 0
    broken: int = 0
    """Images of the current epoch that could not be read, over all processes."""


def train(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> TrainResult:
    """Train a classifier as a configuration says.

    Runs in one process, or in each of several started by ``torchrun`` or ``accelerate launch``; the first one writes
    and prints. The output directory receives ``config.yaml`` (with what follows from it under ``resolved``),
    ``metrics.csv`` (:class:`~gspn.tasks.classify.records.EpochRow`), ``tensorboard/``, and in ``best/`` and ``last/``
    a ``model.safetensors`` and a ``config.json`` that ``timm.create_model("local-dir:...", pretrained=True)`` loads.
    These hold the average of the weights where one is kept; ``best`` that of the two which is more accurate.

    Every random number is a function of seed, epoch, update and process. A run that was killed at any moment and
    resumed therefore ends with the weights of the uninterrupted one, bit for bit wherever the kernels are
    deterministic: always on a CPU with as many threads, on CUDA with ``run.deterministic``.

    Args:
        config: What to do.
        resume: Continue from the newest whole checkpoint in the output directory; from the start if there is none.
        console: Where to print; standard output by default.

    Returns:
        The best accuracy and where everything is.

    Raises:
        UsageError: a request that cannot be met, such as an unknown model, an output directory that holds another
            run, or a resumed run whose configuration differs; also where the loss is not finite any more.
        MissingExtraError: timm, accelerate or another package of ``gspn[train]`` is not installed.

    Example:
        >>> from gspn.tasks.classify import load_config, train
        >>> config = load_config("digits_pico").changed("schedule.epochs=1", "run.output=/tmp/digits")
        >>> train(config).best_top1  # doctest: +SKIP
        62.4
    """
    require("accelerate", "timm", "torchvision", "safetensors", "yaml")
    connected = torch.distributed.is_available() and torch.distributed.is_initialized()
    result = _Run(config, resume, console or Console()).fit()
    if not connected and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # which accelerate made for this run
    return result


class _Run:
    def __init__(self, config: TrainConfig, resume: bool, console: Console) -> None:
        self.output = config.run.output
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
        self.store = CheckpointStore(self.output / "checkpoints")
        self.table = MetricsTable(self.output / "metrics.csv")
        self.main = self.accelerator.is_main_process
        self._check_output(config, resume)

        train_data, eval_data = open_pair(config.data)
        self.classes = class_names(train_data)
        seed_everything(derived_seed(config.run.seed, "weights"))
        network = build_model(config.model, num_classes=len(self.classes), size=config.data.size)
        self.preprocessing = resolve_preprocessing(network, config.data)
        pin = self.accelerator.device.type == "cuda"
        where = {"processes": self.accelerator.num_processes, "process": self.accelerator.process_index, "pin": pin}
        self.train_loader = train_loader(train_data, config, self.preprocessing, **where)
        self.eval_loader = eval_loader(
            eval_data,
            self.preprocessing,
            batch_size=eval_batch_size(config.data),
            workers=config.data.workers,
            **where,
        )
        self.updates = self.train_loader.sampler.updates
        self.config = replace(config, resolved=self._resolve(config, network, len(train_data), len(eval_data)))
        self.resolved: Resolved = self.config.resolved  # type: ignore[assignment]
        self._check_resumed(resume)
        self._prepare(network)

        self.mixup = make_mixup(config, len(self.classes))
        self.criterion = make_criterion(config)
        self._broken_said: tuple[set[int], set[int]] = (set(), set())
        self.position = _Position()
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

    # --- Setting up ---------------------------------------------------------------------------------------------------

    def _check_output(self, config: TrainConfig, resume: bool) -> None:
        if config.run.fsdp and not self.sharded:
            raise UsageError(
                "run.fsdp is true, and weights are sharded over several GPUs only; start with "
                "torchrun --nproc-per-node N, or set run.fsdp=false."
            )
        if self.sharded and config.ema.decay is not None:
            raise UsageError(f"ema.decay is {config.ema.decay:g}, and FSDP keeps no whole weights; set ema.decay=null.")
        if self.output.exists() and not self.output.is_dir():
            raise UsageError(f"run.output {str(self.output)!r} is a file; name a directory.")
        if not resume and (self.store.newest() is not None or self.table.path.exists()):
            raise UsageError(
                f"run.output {str(self.output)!r} holds a run already; continue it with --resume, "
                "or name another directory with --output."
            )
        # No process looks before all have: the first one writes soon.
        self.accelerator.wait_for_everyone()

    def _resolve(self, config: TrainConfig, network: nn.Module, train_images: int, eval_images: int) -> Resolved:
        images = self.train_loader.sampler.images_per_update
        base = config.optim.lr_base_batch
        scale = 1.0 if base is None else images / base
        return Resolved(
            processes=self.accelerator.num_processes,
            images_per_update=images,
            updates_per_epoch=self.updates,
            lr=config.optim.lr * scale,
            min_lr=config.schedule.min_lr * scale,
            warmup_lr=config.schedule.warmup_lr * scale,
            num_classes=len(self.classes),
            train_images=train_images,
            eval_images=eval_images,
            parameters=count_parameters(network),
            **asdict(self.preprocessing),
        )

    def _check_resumed(self, resume: bool) -> None:
        """A resumed run is the same run, or it is refused."""
        path = self.output / "config.yaml"
        if resume and path.is_file():
            old = flat(read_yaml(path.read_text(encoding="utf-8"), str(path)))
            new = flat(to_mapping(self.config))
            free = {*_FREE, "resolved.processes"}
            for key in sorted(old.keys() | new.keys()):
                if key not in free and old.get(key) != new.get(key):
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
            self.position = _Position(**self.store.load(self.accelerator, newest))
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

    def _save_weights(
        self, name: str, which: str, weights: dict[str, Any], top1: dict[str, float | None], epoch: int
    ) -> None:
        if self.main:
            directory = self.output / name
            save_config(directory, self.network, self.config.model, self.preprocessing, self.classes)
            save_weights(directory, weights[which], {"epoch": epoch, "weights": which, "top1": top1[which]})

    # --- The loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> TrainResult:
        config, position = self.config, self.position
        epochs = config.schedule.epochs
        self._announce()
        try:
            with self._trackers(), self.reporter.running():
                saved = time.monotonic()
                for epoch in range(position.epoch, epochs):
                    self._train_epoch(epoch, saved)
                    self._end_epoch(epoch)
                    saved = time.monotonic()
        finally:
            self._say_broken()
        self.accelerator.wait_for_everyone()
        return TrainResult(
            self.output,
            position.best_top1,
            position.best_epoch,
            self.table.last(),
            tuple(self.train_loader.broken.names.values()),
            self.main,
        )

    def _train_epoch(self, epoch: int, saved: float) -> None:
        position, config = self.position, self.config
        self.model.train()
        if self.mixup is not None and config.augment.mix_epochs is not None:
            self.mixup.mixup_enabled = epoch < config.augment.mix_epochs
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
            # After loading, which may draw in this process too: mixup and drop path begin from here.
            seed_everything(derived_seed(config.run.seed, "update", epoch, update, part, accelerator.process_index))
            images = to_device(images, accelerator.device, config.model.channels_last)
            targets = targets.to(accelerator.device, non_blocking=True)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            # Gradients are exchanged between processes once an update.
            more = part + 1 < accumulate
            with accelerator.no_sync(self.model) if more else contextlib.nullcontext():
                loss = self.criterion(self.model(images), targets)
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
        config, position = self.config, self.position
        loss = position.loss_sum / (self.updates * self.accelerator.num_processes)
        self._check_finite(loss)
        last = epoch + 1 == config.schedule.epochs
        raw = ema = None
        if last or (epoch + 1) % config.run.eval_every == 0:
            self.reporter.evaluating(epoch)
            raw = self._evaluate(self.accelerator.unwrap_model(self.model))
            ema = None if self.ema is None else self._evaluate(self.ema.module)
        row = EpochRow(
            epoch=epoch + 1,
            step=self._step,
            lr=self.lr,
            train_loss=loss,
            eval_loss=raw and raw.loss,
            top1=raw and raw.top1,
            top5=raw and raw.top5,
            ema_loss=ema and ema.loss,
            ema_top1=ema and ema.top1,
            seconds=position.seconds,
            images_per_second=self.updates * self.resolved.images_per_update / max(position.seconds, 1e-9),
            peak_memory_mib=peak_memory_mib(self.accelerator.device),
            broken_images=position.broken,
        )
        best = self._write_weights(row)
        if self.main:
            self.table.append(row)
        self.accelerator.log({key: value for key, value in asdict(row).items() if value is not None}, step=row.step)
        position.epoch, position.update, position.loss_sum, position.seconds, position.broken = (
            epoch + 1,
            0,
            0.0,
            0.0,
            0,
        )
        self._save()
        self.reporter.epoch(row, best)
        self._say_broken()

    def _write_weights(self, row: EpochRow) -> bool:
        """Write `last`, and `best` where this is the best epoch so far; says whether it is."""
        position = self.position
        # Every process takes part in this: under FSDP each has a share.
        weights: dict[str, Any] = {"raw": self.accelerator.get_state_dict(self.model)}
        top1 = {"raw": row.top1}
        if self.ema is not None:
            weights["ema"], top1["ema"] = self.ema.module.state_dict(), row.ema_top1
        self._save_weights("last", "ema" if self.ema is not None else "raw", weights, top1, row.epoch)
        # The average where both are as good: it varies less.
        which = max(weights, key=lambda one: (-1.0 if top1[one] is None else top1[one], one == "ema"))
        reached = top1[which]
        if reached is None or reached <= position.best_top1:
            return False
        position.best_top1, position.best_epoch = reached, row.epoch
        self._save_weights("best", which, weights, top1, row.epoch)
        return True

    def _evaluate(self, model: nn.Module) -> Figures:
        if self.accelerator.num_processes > 1 and not self.sharded:
            # Running statistics are each process's own until the first one's are taken.
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        return evaluate_batches(
            model, self.eval_loader, self.accelerator, channels_last=self.config.model.channels_last
        )

    # --- Reports ------------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        config, resolved = self.config, self.resolved
        device = self.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.reporter.say(
            f"{config.model.name}, {resolved.parameters / 1e6:.2f} M parameters, on {name} "
            f"({resolved.processes} process{'es' if resolved.processes > 1 else ''}, {config.run.precision})",
            f"{config.data.name}: {resolved.train_images:,} + {resolved.eval_images:,} images, "
            f"{resolved.num_classes} classes, {config.data.size} pixels",
            f"epochs {config.schedule.epochs}, updates {resolved.updates_per_epoch:,} an epoch, images "
            f"{resolved.images_per_update} an update, {config.optim.name}, lr {resolved.lr:.3g}; writes {self.output}",
        )
        if self._step:
            at = f", update {self.position.update}" if self.position.update else ""
            self.reporter.say(f"resumed after epoch {self.position.epoch}{at}")

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

    def _count_broken(self, before: int) -> int:
        """Broken images of this epoch over all processes, ``before`` of them before this process began."""
        found = torch.tensor([len(self.train_loader.broken.epoch)], device=self.accelerator.device)
        return before + int(self.accelerator.reduce(found, "sum").item())  # type: ignore[union-attr]

    def _say_broken(self) -> None:
        for record, said in zip((self.train_loader.broken, self.eval_loader.broken), self._broken_said, strict=True):
            line = record.summary()
            record.epoch.clear()
            # The same ones are not named again after every epoch.
            if line is not None and not said >= record.names.keys():
                said.update(record.names)
                # Each process knows of its own share.
                self.reporter.warn(line)

"""The training loop: updates, epochs, checkpoints, and resuming. A :class:`~.task.Task` says what is trained."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

import torch
from rich.console import Console
from torch import Tensor

from ..._console import default_console
from ..._errors import UsageError, require
from ..._files import naming, printable, read_text, replaced, short, write_text
from ..._locks import DirectoryLock
from .checkpoints import CheckpointStore, Training
from .config import from_mapping, read_yaml, setting, to_mapping, write_yaml
from .devices import batchnorm_errors, distributed_context, make_accelerator, peak_memory_mib
from .metrics_table import MetricsTable, Row
from .optimization import make_optimizer, make_scheduler
from .progress import Reporter
from .seeding import derived_seed, seed_everything
from .task import Context, Models, Resolved, Setup, Task, TrainingResult, Weights

if TYPE_CHECKING:
    from PIL import Image

# In the output directory.
_CHECKPOINTS, _TABLE, _CONFIG = "checkpoints", "metrics.csv", "config.yaml"

# Updates between two questions to the first process whether a checkpoint is due; each is a message to all others.
_ASK_EVERY = 16

# What a run whose loss is no longer finite may change when it is resumed.
_REMEDIES = ("optim.lr", "optim.clip_grad", "resolved.lr")

# Fields of `Position` in the checkpoints of version 0.1.0.
_RENAMED = {"best_top1": "best_score"}


def fit(task: Task[Any, Row], *, resume: bool = False, console: Console | None = None) -> TrainingResult[Row]:
    """Train a task and return the result.

    Runs in one process, or in each of several started by ``torchrun`` or ``accelerate launch``; the first one writes
    and prints. Every random number is a function of seed, epoch, update and process. A run that was killed at any
    moment and resumed therefore ends with the weights of the uninterrupted one, bit for bit wherever the kernels are
    deterministic: always on a CPU with the same number of threads, on CUDA with ``run.deterministic``.

    Args:
        task: The task, with its configuration.
        resume: Continue from the newest checkpoint in the output directory, from the start if there is none. Where
            it is damaged the one before is taken, and a line says so. ``optim.lr`` and ``optim.clip_grad`` may have
            other values from there on, for a run whose loss is no longer finite; a line says so, too.
        console: The console to print on; standard output by default.

    Raises:
        UsageError: a request that cannot be met, such as an output directory that holds another run, or a resumed run
            whose configuration differs; another process that writes there; checkpoints of which none is whole; also a
            loss that is not finite.
        MissingExtraError: timm, accelerate or another package is not installed.
    """
    require("accelerate", "timm", "torchvision", "safetensors", "yaml")
    output = task.config.run.output
    with naming(output), distributed_context(), batchnorm_errors(), contextlib.ExitStack() as held:
        return _Run(task, resume, console or default_console(), held).run()


def refuse_existing(output: Path, resume: bool) -> None:
    """Refuse an output directory that is a file, or holds a run which is not to be continued."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"run.output {str(output)!r} is a file; name a directory.")
    if not resume and (CheckpointStore(output / _CHECKPOINTS).exists() or (output / _TABLE).exists()):
        raise UsageError(
            f"run.output {str(output)!r} holds a run already; continue it with --resume, or name another directory "
            "with --output."
        )


@dataclass
class Position:
    """The position in a run: all that a checkpoint holds besides weights, optimizer and average."""

    epoch: int = setting(0, 0)
    """Epochs completed."""
    update: int = setting(0, 0)
    """Updates completed in the current epoch."""
    loss_sum: float = setting(0.0)
    """Sum over the current epoch's updates and all processes."""
    seconds: float = setting(0.0, 0)
    """Time of the current epoch's updates."""
    broken: int = setting(0, 0)
    """Images of the current epoch that could not be read, over all processes."""
    best_score: float = setting(-1.0)
    best_epoch: int = setting(0, 0)


class _Run(Generic[Row]):
    def __init__(self, task: Task[Any, Row], resume: bool, console: Console, held: contextlib.ExitStack) -> None:
        config = task.config
        self.task = task
        self.output: Path = config.run.output
        self.accelerator = make_accelerator(
            precision=config.run.precision,
            device=config.run.device,
            fsdp=config.run.fsdp,
            deterministic=config.run.deterministic,
            log_with=list(config.run.trackers) or None,
            project_dir=config.run.output,
        )
        self.main = self.accelerator.is_main_process
        self.reporter = Reporter(console, config.schedule.epochs, quiet=not self.main)
        self.context = Context(config, self.accelerator, self.reporter)
        self.store = CheckpointStore(self.output / _CHECKPOINTS)
        self._check_request(config, resume)
        # One process holds the directory for all.
        self.lock = held.enter_context(DirectoryLock(self.output)) if self.main else None
        self.accelerator.wait_for_everyone()
        self.table: MetricsTable[Row] = MetricsTable(self.output / _TABLE, task.row_type)

        seed_everything(derived_seed(config.run.seed, "weights"))
        self.setup = task.setup(self.context)
        self.updates = self.setup.train.order.updates
        self.resolved = self._resolve(config, self.setup)
        self._all_resolved = {**asdict(self.resolved), **self.setup.resolved}
        self.config = config
        self.changed: list[str] = []
        if resume:
            self._compare_config()
        self._prepare()

        self._reported_broken: dict[int, set[int]] = {}
        self.position = Position()
        self.stop_at, self.stopped = math.inf, False
        self.lr = 0.0  # of the last update, for layers whose rate is not reduced
        if resume:
            self._load()
        # Not before the checkpoint is found whole: a resumed run that is refused changes nothing.
        self.accelerator.wait_for_everyone()
        if self.main:
            self._write_config()

    # --- Setting up ---------------------------------------------------------------------------------------------------

    def _check_request(self, config: Any, resume: bool) -> None:
        if config.run.fsdp and not self.context.sharded:
            raise UsageError(
                "run.fsdp is true, and weights are sharded over several GPUs only; start with "
                "torchrun --nproc-per-node N, or set run.fsdp=false."
            )
        if self.accelerator.distributed_type in ("DEEPSPEED", "MEGATRON_LM"):
            raise UsageError(
                f"this was started with {self.accelerator.distributed_type}, whose checkpoints can run code when they "
                "are loaded; start with torchrun, and set run.fsdp=true to shard the weights."
            )
        if self.context.sharded and config.ema.decay is not None:
            raise UsageError(f"ema.decay is {config.ema.decay:g}, and FSDP keeps no whole weights; set ema.decay=null.")
        refuse_existing(self.output, resume)
        # The first process writes soon; the others must have looked before.
        self.accelerator.wait_for_everyone()

    def _resolve(self, config: Any, setup: Setup) -> Resolved:
        order, base = setup.train.order, config.optim.lr_base_batch
        scale = 1.0 if base is None else order.images_per_update / base
        return Resolved(
            processes=self.accelerator.num_processes,
            images_per_update=order.images_per_update,
            updates_per_epoch=order.updates,
            lr=config.optim.lr * scale,
            min_lr=config.schedule.min_lr * scale,
            warmup_lr=config.schedule.warmup_lr * scale,
            parameters=sum(one.numel() for one in setup.model.parameters() if one.requires_grad),
            num_classes=setup.num_classes,
            train_images=order.images,
        )

    def _compare_config(self) -> None:
        path = self.output / _CONFIG
        if not path.exists():
            if self.store.exists():
                raise UsageError(f"{str(path)!r} of this run is missing; restore it, or name another --output.")
            return
        saved = read_yaml(read_text(path), str(path))
        if not isinstance(saved, Mapping):
            raise UsageError(f"{str(path)!r} is not the configuration of a run; restore it, or name another --output.")
        for key, (old, new) in self.config.differences(saved, self._all_resolved).items():
            if key in _REMEDIES:
                if not key.startswith("resolved."):
                    self.changed.append(f"{key} is {new!r} from here on, and was {old!r}")
            else:
                if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
                    i = next(i for i, (one, other) in enumerate(zip(old, new, strict=True)) if one != other)
                    key, old, new = f"{key}[{i}]", old[i], new[i]
                remedy = "Restore the data" if "_files" in key or "_classes" in key else "Leave it out"
                raise UsageError(printable(
                    f"{key} is {short(new)}, and the run in {str(self.output)!r} has {short(old)}; a resumed run keeps "
                    f"it. {remedy}, or start another run with --output."
                ))  # fmt: skip

    def _write_config(self) -> None:
        write_text(self.output / _CONFIG, write_yaml({**to_mapping(self.config), "resolved": self._all_resolved}))

    def _prepare(self) -> None:
        config, model = self.config, self.setup.model
        if config.model.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model = model.to(self.accelerator.device)
        self.ema, ema = None, config.ema
        if ema.decay is not None:
            warmup = {"use_warmup": ema.warmup, "warmup_gamma": ema.warmup_gamma, "warmup_power": ema.warmup_power}
            self.ema = require("timm.utils").ModelEmaV3(model, decay=ema.decay, **warmup)
        optimizer = make_optimizer(config.optim, model, self.resolved.lr)
        self.scheduler = make_scheduler(config.schedule, optimizer, self.resolved)
        if config.model.compile:
            model.compile()
        self.unwrapped = model
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.training = Training(self.accelerator, self.model, self.optimizer, self.ema)

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    @property
    def _step(self) -> int:
        return self.position.epoch * self.updates + self.position.update

    def _load(self) -> None:
        # The rates are functions of the configuration and the update alone.
        rates = [{key: group[key] for key in ("lr", "initial_lr") if key in group} for group in self._groups]
        state, damaged = self.store.load_newest(self.training)
        for line in damaged:
            if self.main:
                self.reporter.warn(line)
        if state is not None:
            renamed = {_RENAMED.get(key, key): value for key, value in state.items()}
            self.position = from_mapping(Position, renamed, f"the state in {self.store.directory}")
            if self.position.update >= self.updates or self.position.epoch > self.config.schedule.epochs:
                raise UsageError(f"the state in {self.store.directory} is of another run; start one with --output.")
            for group, rate in zip(self._groups, rates, strict=True):
                group.update(rate)
            if self.scheduler is not None:
                self.scheduler.step_update(self._step)
        if self.main:
            self.table.forget_after(self._step)
        self.accelerator.wait_for_everyone()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _save(self) -> None:
        self._check_finite(weights=True)
        self._keep_directory()
        self.store.save(self.training, self._step, asdict(self.position))

    def _keep_directory(self) -> None:
        """Create the output directory again, with all that belongs in it, where somebody removed it."""
        removed = self.main and self.lock is not None and not self.lock.is_held()
        if not self._sum(removed):
            return
        self.position.best_score, self.position.best_epoch = -1.0, 0  # the best so far is gone
        if self.main and self.lock is not None:
            self.reporter.warn(
                f"{self.output} was removed while this run writes to it; it is created again, without the earlier "
                "samples, curves and best/."
            )
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.lock.renew()
            self._write_config()
            self.table.write()
            self._start_trackers()

    def _is_past(self, moment: float) -> bool:
        """Whether the first process finds that it is past a time; the processes' clocks differ."""
        if self.accelerator.num_processes == 1:
            return time.monotonic() >= moment
        if moment == math.inf or self.position.update % _ASK_EVERY:
            return False
        return bool(self._sum(self.main and time.monotonic() >= moment))

    def _sum(self, value: float) -> int:
        """A number summed over all processes."""
        own = torch.tensor([value], dtype=torch.float32, device=self.accelerator.device)
        return int(self.accelerator.reduce(own, "sum").item())  # type: ignore[union-attr]

    # --- The loop -----------------------------------------------------------------------------------------------------

    def run(self) -> TrainingResult[Row]:
        self._announce()
        try:
            images = self.setup.train.order.images_in(0, self.updates) / self.updates
            with self._trackers(), self.reporter.running(self.updates, images, self._step):
                saved = time.monotonic()
                if self.config.run.stop_after_s is not None:
                    self.stop_at = saved + self.config.run.stop_after_s
                for epoch in range(self.position.epoch, self.config.schedule.epochs):
                    self._train_epoch(epoch, saved)
                    self._end_epoch(epoch)
                    if self.stopped:
                        self.reporter.say(f"stopped in epoch {epoch + 1} by run.stop_after_s")
                        break
                    saved = time.monotonic()
        finally:
            self._report_broken()
        self.accelerator.wait_for_everyone()
        position, broken = self.position, tuple(self.setup.train.broken.names.values())
        return TrainingResult(
            self.output, self.table.last(), position.best_score, position.best_epoch, broken, self.main
        )

    def _train_epoch(self, epoch: int, saved: float) -> None:
        position, config = self.position, self.config
        self.model.train()
        batches = self.setup.train.batches(epoch, position.update)
        broken_before = position.broken

        def count(total: Tensor) -> None:
            (position.loss_sum,) = self.context.sum(total[None])
            position.broken = broken_before + self._sum(len(self.setup.train.broken.epoch))

        # Summed on the device: reading each loss would wait for it.
        total = torch.tensor(position.loss_sum if self.main else 0.0, dtype=torch.float64)
        total = total.to(self.context.counting_device)
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
                self._check_finite(total.item())  # of every update so far
                self.accelerator.log({"update_loss": loss.item(), "lr": self.lr}, step=self._step)
            self.stopped = self._is_past(self.stop_at)
            if self.stopped:
                break
            # After the last update of an epoch there is one anyway.
            if update + 1 < self.updates and self._is_past(saved + config.run.checkpoint_every_s):
                count(total)
                self._check_finite(position.loss_sum)
                total.fill_(position.loss_sum if self.main else 0.0)
                self._save()
                saved, clock = time.monotonic(), time.perf_counter()
        count(total)
        position.seconds += time.perf_counter() - clock

    def _update(self, epoch: int, update: int, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """One update from this process's next batches; returns their mean loss, on the device."""
        config, accelerator = self.config, self.accelerator
        accumulate = config.optim.accumulate
        total = torch.zeros((), device=accelerator.device)
        for part in range(accumulate):
            images, targets = next(batches)
            # After loading, which may draw random numbers in this process, too.
            seed_everything(derived_seed(config.run.seed, "update", epoch, update, part, accelerator.process_index))
            images, targets = self.context.to_device(images), targets.to(accelerator.device, non_blocking=True)
            # Gradients are exchanged between processes once per update.
            more = part + 1 < accumulate
            with accelerator.no_sync(self.model) if more else contextlib.nullcontext():
                loss = self.task.loss(self.model, images, targets, epoch)
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
            self.ema.update(self.unwrapped, step=done)
        return total

    def _end_epoch(self, epoch: int) -> None:
        """Evaluate, save the model, the row and the checkpoint, in this order: a kill in between loses nothing."""
        position, run = self.position, self.config.run
        loss = position.loss_sum / (position.update * self.accelerator.num_processes)
        self._check_finite(loss, weights=True)
        metrics: Mapping[str, float | None] = {}
        if self.stopped or epoch + 1 == self.config.schedule.epochs or (epoch + 1) % run.eval_every == 0:
            self.reporter.doing("evaluating")
            metrics = self.task.evaluate(Models(self.model, self.ema and self.ema.module), self.context)
        row = self.task.row_type(
            epoch=epoch + 1,
            step=self._step,
            lr=self.lr,
            train_loss=loss,
            seconds=position.seconds,
            images_per_second=self.setup.train.order.images_in(epoch, position.update) / max(position.seconds, 1e-9),
            peak_memory_mib=peak_memory_mib(self.accelerator.device),
            broken_images=position.broken,
            **metrics,
        )
        self._keep_directory()
        score = self.task.score(row)
        best = score is not None and score > position.best_score
        if score is not None and best:
            position.best_score, position.best_epoch = score, row.epoch
        # Every process takes part: under FSDP each has a share of the weights.
        raw: Any = self.accelerator.get_state_dict(self.model)
        weights = Weights(raw, self.ema and self.ema.module.state_dict())
        if self.main:
            samples = self.task.save(weights, row, self.output, self.context, best=best)
            if samples is not None:
                self._show(samples, row)
            self.table.append(row)
        self.accelerator.log({key: value for key, value in asdict(row).items() if value is not None}, step=row.step)
        position.epoch, position.update = epoch + 1, 0
        position.loss_sum, position.seconds, position.broken = 0.0, 0.0, 0
        self._save()
        self.reporter.epoch(row, best=best)
        self._report_broken()

    def _show(self, samples: Image.Image, row: Row) -> None:
        with replaced(self.output / "samples" / f"epoch-{row.epoch:05d}.png") as part:
            samples.save(part, format="PNG")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                import numpy as np

                tracker.log_images({"samples": np.asarray(samples)[None]}, step=row.step, dataformats="NHWC")

    # --- Reports ------------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        config, resolved, device = self.config, self.resolved, self.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        processes = f"{resolved.processes} process{'es' if resolved.processes > 1 else ''}"
        sizes = ", ".join(f"{size} ({count} a batch)" for size, count in self.setup.train.order.sizes.items())
        self.reporter.say(
            f"{self.setup.model_title}, {resolved.parameters / 1e6:.2f} M parameters, on {name} ({processes}, "
            f"{config.run.precision})",
            self.setup.data_title,
            *self.setup.notes,
            *([f"images of {sizes} pixels, one size an update, at random"] if sizes else []),
            f"{config.schedule.epochs} epochs of {resolved.updates_per_epoch:,} updates, each of "
            f"{'at most ' if sizes else ''}{resolved.images_per_update} images; {config.optim.name}, lr "
            f"{resolved.lr:.3g}; writes {self.output}",
        )
        if self._step:
            update = f", update {self.position.update}" if self.position.update else ""
            self.reporter.say(f"resumed after epoch {self.position.epoch}{update}", *self.changed)

    @contextlib.contextmanager
    def _trackers(self) -> Iterator[None]:
        self._start_trackers()
        try:
            yield
        finally:
            # Not end_training, which would also close the connection between the processes.
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _start_trackers(self) -> None:
        names = self.config.run.trackers
        if "tensorboard" in names:
            require("tensorboard")
        # What a killed run logged after its checkpoint is hidden by what the resumed one logs.
        settings = {"tensorboard": {"purge_step": self._step + 1}} if "tensorboard" in names else {}
        self.accelerator.init_trackers("tensorboard", init_kwargs=settings)

    def _check_finite(self, loss: float = 0.0, *, weights: bool = False) -> None:
        if math.isfinite(loss) and (not weights or self.training.is_finite()):
            return
        problem = "weights, or the state of the optimizer, are not finite"
        raise UsageError(
            f"{problem if math.isfinite(loss) else f'the training loss is {loss}'} in epoch {self.position.epoch + 1}. "
            "All checkpoints are finite; continue from the last one with --resume and a lower rate, such as "
            f"optim.lr={self.config.optim.lr / 2:.3g}, or with smaller gradients, such as optim.clip_grad=1."
        )

    def _report_broken(self) -> None:
        for loader in (self.setup.train, self.setup.evaluation):
            if loader is not None:
                record, reported = loader.broken, self._reported_broken.setdefault(id(loader), set())
                line = record.summary()
                record.epoch.clear()
                # The same images are not named again after every epoch.
                if line is not None and not reported >= record.names.keys():
                    reported.update(record.names)
                    self.reporter.warn(line)  # in every process: each knows its own share

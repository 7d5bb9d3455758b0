"""Training in processes of its own, all forked from one server that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gspn.tasks.core import checkpoints, devices

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = [
    "timm.data", "timm.optim", "torchvision", "accelerate", "transformers", "diffusers", "gspn.models",
    "gspn.tasks.classify.training", "gspn.tasks.class_conditional.training",
    "gspn.tasks.text_to_image.distill.training",
]  # fmt: skip
_CONTEXT.set_forkserver_preload([name for name in _PRELOADED if find_spec(name.partition(".")[0])])


def start(work: Any, *arguments: Any, die_in_checkpoint: int | None = None) -> Any:
    """Call ``work`` in a process; with ``die_in_checkpoint``, it is killed while it writes that checkpoint."""
    process = _CONTEXT.Process(target=_run, args=(work, arguments, die_in_checkpoint))
    process.start()
    return process


def kill_at_random(process: Any, checkpoints_of: Path, updates: int) -> None:
    """Kill a training process some time after a random one of its first ``updates`` checkpoints."""
    wanted = random.Random().randint(1, updates)
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if any(int(path.name[5:]) >= wanted for path in (checkpoints_of / "checkpoints").glob("step-*")):
            time.sleep(random.Random().uniform(0, 0.05))
            break
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def start_many(count: int, printed: Path, work: Any, *arguments: Any) -> None:
    """Call ``work`` in so many connected processes, as torchrun would; ``printed`` receives what they print."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [
        _CONTEXT.Process(target=_connected, args=(rank, count, port, printed, work, arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * count


def shard_on_cpu() -> None:
    """Let accelerate shard over processes on a CPU, which PyTorch can and accelerate leaves to GPUs."""
    plain = devices.make_accelerator

    def make_accelerator(**options: Any) -> Any:
        from accelerate import FullyShardedDataParallelPlugin
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.utils import DistributedType

        sharded = options.pop("fsdp")
        accelerator = plain(**options)
        if sharded:
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10_000,
                state_dict_type="SHARDED_STATE_DICT",
            )  # fmt: skip
            AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
            PartialState._shared_state |= {"distributed_type": DistributedType.FSDP}
        return accelerator

    from gspn.tasks.core import loop

    loop.make_accelerator = make_accelerator


def _run(work: Any, arguments: tuple[Any, ...], die_in_checkpoint: int | None) -> None:
    torch.set_num_threads(1)
    if die_in_checkpoint is not None:
        plain, calls = checkpoints.write_text, []

        def write_text(path: Path, text: str) -> None:
            calls.append(path)
            if len(calls) == die_in_checkpoint:
                # Weights and optimizer are there, half of what describes them is, and the name is not.
                path.write_text(text[: len(text) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            plain(path, text)

        checkpoints.write_text = write_text
    work(*arguments)


def _connected(rank: int, count: int, port: int, printed: Path, work: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # Their own output is that of the server that forked them, which another test may have started.
    with printed.open("a") as file:
        os.dup2(file.fileno(), 1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
    }  # fmt: skip
    work(*arguments)

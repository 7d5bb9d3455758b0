"""Runs targets on inputs that are made from seeds, in processes of their own, and reports what must not happen."""

from __future__ import annotations

import base64
import contextlib
import faulthandler
import json
import os
import random
import re
import resource
import signal
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

FOLDER = Path(__file__).parent
CASES = FOLDER / "cases"
FINDS = FOLDER / "finds"

MEMORY = 1 << 30
"""Bytes that an input may take beyond those of the process."""
SECONDS = 5
"""Processor time that an input may take."""
_HANG = 30  # seconds by the clock, on a machine that does other work as well

Input = dict[str, Any]
"""Files, as names and bytes; or the arguments of a call, as JSON has them."""


@dataclass(frozen=True)
class Target:
    """A part of the public surface.

    ``make`` returns an input and depends on the generator alone. ``check`` returns, or raises what must not happen.
    ``quick`` is the number of inputs in the test suite.
    """

    name: str
    make: Callable[[random.Random], Input]
    check: Callable[[Input], None]
    quick: int

    def input(self, seed: int) -> Input:
        """The input of a seed."""
        return self.make(random.Random(f"{self.name} {seed}"))


@dataclass(frozen=True)
class Find:
    """An input with a result that must not be, and what happened."""

    target: str
    seed: int
    input: Input
    problem: str

    @property
    def kind(self) -> str:
        """The problem without its details, by which finds are told apart."""
        return re.sub(r"\d+", "N", self.problem.strip().splitlines()[-1])[:60]

    def save(self) -> Path:
        """Write it among the finds, in the form of a case."""
        FINDS.mkdir(exist_ok=True)
        path = FINDS / f"{self.target}-{self.seed}.json"
        case = {"target": self.target, "problem": self.problem.strip().splitlines()[-1], "input": self.input}
        path.write_text(json.dumps(case, indent=1, default=_as_json) + "\n", encoding="utf-8")
        return path


def read_case(path: Path) -> tuple[str, Input]:
    """The target and the input of a case."""
    case = json.loads(path.read_text(encoding="utf-8"), object_hook=_from_json)
    return case["target"], case["input"]


def _as_json(value: bytes) -> dict[str, str]:
    if value.isascii() and value.decode().isprintable():
        return {"text": value.decode()}
    return {"zlib": base64.b64encode(zlib.compress(value, 9)).decode("ascii")}


def _from_json(value: dict[str, Any]) -> Any:
    if value.keys() == {"text"}:
        return value["text"].encode()
    return zlib.decompress(base64.b64decode(value["zlib"])) if value.keys() == {"zlib"} else value


def run(
    target: Target,
    seeds: Sequence[int],
    make: Callable[[int], Input] | None = None,
    *,
    seconds: float = float("inf"),
    threads: int = 1,
) -> tuple[int, list[Find]]:
    """Check the inputs of ``seeds``, and return how many were checked and the finds.

    The process that checks is a fork of this one. After an input that ends it another one continues behind it.
    """
    make = make or target.input
    make(seeds[0])  # here, so that every fork has the undamaged inputs
    end, position, finds = time.monotonic() + seconds, 0, []
    while position < len(seeds) and time.monotonic() < end:
        for seed, problem in _checked(target, seeds[position:], make, end, threads):
            if problem is None:
                position += 1
            else:
                finds.append(Find(target.name, seed, make(seed), problem))
    return position, finds


def _checked(
    target: Target, seeds: Sequence[int], make: Callable[[int], Input], end: float, threads: int
) -> Iterator[tuple[int, str | None]]:
    """Each seed when its input begins to be checked, with None; and again with the problem if there is one."""
    read, write = os.pipe()
    with tempfile.TemporaryFile() as log:
        child = os.fork()
        if child == 0:
            os.close(read)
            with contextlib.suppress(BaseException):
                _work(target, seeds, make, end, threads, os.fdopen(write, "w"), log)
            os._exit(0)
        os.close(write)
        seed = None
        with os.fdopen(read) as lines:
            for line in lines:
                seed, problem = json.loads(line)
                yield seed, problem
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            log.seek(0)
            reason = signal.Signals(-status).name if status < 0 else f"no end within {_HANG} s"
            yield seeds[0] if seed is None else seed, f"{log.read().decode(errors='replace')[-4000:]}\n{reason}"


def _work(
    target: Target, seeds: Sequence[int], make: Callable[[int], Input], end: float, threads: int, out: IO[str],
    log: IO[bytes],
) -> None:  # fmt: skip
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    faulthandler.enable(2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for seed in seeds:
        if time.monotonic() > end:
            return
        print(json.dumps([seed, None]), file=out, flush=True)
        made = make(seed)
        random.seed(0)
        torch.manual_seed(0)
        faulthandler.dump_traceback_later(_HANG, exit=True, file=2)
        begin = time.process_time()
        try:
            target.check(made)
            problem = None
        except BaseException:
            problem = traceback.format_exc(limit=-12)
        faulthandler.cancel_dump_traceback_later()
        spent = time.process_time() - begin
        if problem is None and spent > SECONDS * threads:
            problem = f"it took {spent:.1f} s of processor time"
        if problem is not None:
            print(json.dumps([seed, problem]), file=out, flush=True)

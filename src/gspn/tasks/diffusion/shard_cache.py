r"""A directory of encoded data: written once, in shards, and resumed after a kill to the same bytes.

====================================  ==================================================================================
``index.json``                        a :class:`CacheIndex`: what was requested, and the shards
``NAME-00000.safetensors``, ...       tensors of ``shard_size`` rows each
``NAME-00000.json``, ...              the :class:`Shard`, until the index lists it
====================================  ==================================================================================
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from ..._errors import UsageError, require
from ..._files import file_digest, open_tensors, printable, read_json, replaced, short, write_text
from ..._locks import DirectoryLock
from ..core.config import flat, from_mapping, setting, to_mapping
from ..core.devices import distributed_context, make_accelerator
from ..core.progress import progress_bar

INDEX = "index.json"

# Files that a reader keeps open; a data set may have more than a process may open.
_MOST_OPEN = 256

FORMAT = 2
"""The format of an index that is written. Format 1, of gspn 0.1.0, is read as well."""


@dataclass(frozen=True)
class Shard:
    """A file of a cache: the rows that could be encoded of ``shard_size`` requested ones."""

    file: str
    rows: int
    sha256: str
    bytes: int | None = None
    """Size of the file; unknown for captions that gspn 0.1.0 encoded."""
    dtype: str | None = None
    """``float16``, or ``float32`` where a number is beyond its range."""
    broken: list[str] = field(default_factory=list)
    """Names of what could not be read, and is left out."""

    def problem(self, directory: Path, shapes: Mapping[str, Sequence[int]], *, checksum: bool) -> str:
        """The difference between the file and this record with the shapes of a row of each tensor; empty if none."""
        path = directory / self.file
        try:
            size = path.stat().st_size
            if size != (self.bytes or size):
                return f"has {size:,} bytes and not {self.bytes:,}"
            with open_tensors(path) as file:
                actual = {name: file.get_slice(name).get_shape() for name in shapes or file.keys()}
            if any([self.rows, *shapes.get(name, shape[1:])] != shape for name, shape in actual.items()):
                return f"is not what {INDEX} says"
            return "does not have its checksum" if checksum and file_digest(path) != self.sha256 else ""
        except (OSError, UsageError) as error:
            return f"cannot be read ({error})"


@dataclass(frozen=True, kw_only=True)
class CacheIndex:
    """``index.json``. A cache derives from it, and adds what its rows depend on."""

    NAME: ClassVar[str]
    """How the names of the shards begin."""

    rows: int = setting(MISSING, 0)
    """Requested, including those that cannot be read."""
    shard_size: int = setting(MISSING, 1)
    format: int = FORMAT
    shards: list[Shard] = field(default_factory=list)
    """Empty until all of them are written."""

    @property
    def shard_count(self) -> int:
        """The number of shards, once all are written."""
        return -(-self.rows // self.shard_size)

    def rows_of(self, shard: int) -> range:
        """The requested rows of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.rows))

    @classmethod
    def converted(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values of an index of format 1 under the keys of this one."""
        return values

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """The index of a directory, or None where there is none.

        Raises:
            UsageError: It cannot be read, or has another format.
        """
        path = directory / INDEX
        try:
            values = read_json(path)
            if values["format"] == 1:
                values = cls.converted(values)
            elif values["format"] != FORMAT:
                raise UsageError(
                    f"it has format {short(values['format'])}, and this version of gspn reads 1 to {FORMAT}"
                )
            index = from_mapping(cls, values)
            index.validate()
            return index
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).removesuffix(".")
            raise UsageError(
                f"{printable(path)!r} cannot be read as an index of {cls.NAME}: {printable(reason)}; remove the "
                "directory and encode the data again."
            ) from None

    def validate(self) -> None:
        """Refuse numbers and names that no index has.

        Raises:
            ValueError: The message names them.
        """
        if self.shards and len(self.shards) != self.shard_count:
            raise ValueError(f"{len(self.shards)} shards and not {self.shard_count}")
        for number, shard in enumerate(self.shards):
            if not re.fullmatch(rf"{self.NAME}-{number:05d}\.safetensors", shard.file):
                raise ValueError(f"shard {number} is named {short(shard.file)}")
            if not 0 <= shard.rows <= len(self.rows_of(number)):
                raise ValueError(f"shard {number} has {shard.rows} rows")


Index = TypeVar("Index", bound=CacheIndex)


class ShardReader(Generic[Index]):
    """The rows of a complete cache, read from memory-mapped files; ``remedy`` is what errors about files end with."""

    def __init__(self, directory: Path, index: Index, remedy: str) -> None:
        self.directory, self.index, self._remedy = directory, index, remedy
        self._ends = list(itertools.accumulate(shard.rows for shard in index.shards))
        self._opened: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # an opened file does not pass to another process

    def locate(self, i: int) -> tuple[int, int]:
        """The shard of row i, and the row's position in it."""
        if not 0 <= i < len(self):
            raise IndexError(f"{i} is out of range for {len(self)} {self.index.NAME}.")
        shard = bisect.bisect_right(self._ends, i)
        return shard, i - (self._ends[shard - 1] if shard else 0)

    def opened(self, shard: int) -> Any:
        """The file of a shard, opened by safetensors."""
        if shard not in self._opened:
            if len(self._opened) >= _MOST_OPEN:
                self._opened.pop(next(iter(self._opened)))
            with open_tensors(self.directory / self.index.shards[shard].file) as file:
                self._opened[shard] = file
        return self._opened[shard]

    def check(self, shapes: Mapping[str, Sequence[int]], *, checksums: bool = False) -> None:
        """Compare the sizes and the headers of all files with the index, and with the shapes of a row of each tensor.

        ``checksums``: read the files, and compare their checksums too.

        Raises:
            UsageError: A file is missing, cut short, damaged, or not what the index says.
        """
        with ThreadPoolExecutor(8) as pool:  # a hash leaves Python to other threads
            shards = self.index.shards
            problems = pool.map(lambda one: one.problem(self.directory, shapes, checksum=checksums), shards)
            for number, problem in enumerate(problems):
                if problem:
                    raise self.damaged(number, problem)

    def finite(self, shard: int, value: Tensor) -> Tensor:
        """The value; an error that names the shard where it is not finite."""
        if not value.isfinite().all():
            raise self.damaged(shard, "has numbers that are not finite")
        return value

    def damaged(self, shard: int, problem: str = f"is not what {INDEX} says") -> UsageError:
        """An error that names the file of a shard, the problem and the remedy."""
        path = printable(self.directory / self.index.shards[shard].file)
        return UsageError(f"{path!r} {problem}; {self._remedy}.")


Encode = Callable[[list[int], Any, Callable[[int], object]], Iterator[tuple[int, dict[str, Tensor], list[str]]]]
"""From shards, the accelerator, and what is told how many rows are done, to (shard, tensors, names of the broken)."""


@dataclass
class CacheWriter(Generic[Index]):
    """Writes the shards of a directory that are missing.

    A shard is whole or missing. A call that follows a killed one continues after the last whole shard and ends with the
    bytes of an uninterrupted run on the same device; shards with another checksum are encoded again. Of N processes
    started by ``torchrun``, process i writes every N-th shard; a later call may have another N. The first process
    locks the directory for all, unless nothing is missing.

    Args:
        directory: New, empty, or begun with the same request.
        request: The index without shards.
        encode: Encodes shards in their order. Floating-point tensors are written as float16, or as float32 where a
            number of the shard is beyond its range.
        title: Of the progress bar.
        option: What names another directory, as errors say it.
        free: Dotted keys of the request that may differ from the directory's.
        prepare: Called in the first process before anything is encoded.
    """

    directory: Path
    request: Index
    encode: Encode
    title: str
    option: str
    free: tuple[str, ...] = ()
    prepare: Callable[[], None] = lambda: None

    @distributed_context()
    def write(
        self, *, precision: str = "fp32", device: str = "auto", console: Console | None = None
    ) -> tuple[Index, int, bool]:
        """Encode and write what is missing.

        Returns:
            The complete index, the number of shards that this process wrote, and whether it is the first process.

        Raises:
            UsageError: The directory belongs to another request or holds something else, another process writes it, or
                nothing can be read.
        """
        accelerator = make_accelerator(precision=precision, device=device)
        main = accelerator.is_main_process
        console = console if main else None
        begun = self._begun()
        accelerator.wait_for_everyone()  # all have looked before one writes
        index = begun or self.request
        own = range(index.shard_count)[accelerator.process_index :: accelerator.num_processes]
        missing = []
        with progress_bar(console, "checking shards", len(own)) as advance:
            for number in own:
                shard = self._shard(index, number)
                if shard is None or shard.problem(self.directory, {}, checksum=True):
                    missing.append(number)
                advance(1)
        lacking = torch.tensor([float(len(missing)) + (not index.shards)], device=accelerator.device)
        complete = not accelerator.reduce(lacking, "sum").item()  # type: ignore[union-attr]
        lock = contextlib.nullcontext() if complete or not main else DirectoryLock(self.directory, self.option)
        with lock:
            if main:
                if begun is None:
                    write_json(self.directory / INDEX, self.request)
                self.prepare()
            accelerator.wait_for_everyone()
            if missing:
                rows = sum(len(index.rows_of(number)) for number in missing)
                with progress_bar(console, self.title, rows) as advance:
                    for number, tensors, broken in self.encode(missing, accelerator, advance):
                        self._write_shard(number, tensors, broken)
            accelerator.wait_for_everyone()
            if main:
                self._complete(index)
        accelerator.wait_for_everyone()
        return type(index).read(self.directory) or index, len(missing), main

    def _begun(self) -> Index | None:
        """The index of a directory that was begun with this request."""
        name = str(self.directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise UsageError(f"{name!r} is a file; name a directory.")
        begun = type(self.request).read(self.directory)
        if begun is None:
            # What a killed call left before it wrote an index is hidden, and does not count.
            if self.directory.is_dir() and any(not one.name.startswith(".") for one in self.directory.iterdir()):
                raise UsageError(f"{name!r} holds other files and no {INDEX}; name a new directory.")
            return None
        old, new = flat(to_mapping(begun)), flat(to_mapping(self.request))
        for key in sorted(old.keys() | new.keys()):
            if key not in ("format", "shards", *self.free) and old.get(key) != new.get(key):
                raise UsageError(
                    f"{key} is {short(new.get(key))}, and the {begun.NAME} in {name!r} were begun with "
                    f"{short(old.get(key))}; pass the same arguments again, or name another directory with "
                    f"{self.option}."
                )
        return begun

    def _record(self, number: int) -> Path:
        return self.directory / f"{self.request.NAME}-{number:05d}.json"

    def _shard(self, index: Index, number: int) -> Shard | None:
        """A shard's record, from its own file, which is newer, or from the index."""
        path = self._record(number)
        try:
            shard = from_mapping(Shard, read_json(path))
            return shard if shard.file == path.with_suffix(".safetensors").name else None
        except (OSError, ValueError):
            return index.shards[number] if number < len(index.shards) else None

    def _write_shard(self, number: int, tensors: dict[str, Tensor], broken: list[str]) -> None:
        """The file, then its record: after a kill between the two the file is written again."""
        halves = {name: value.half() for name, value in tensors.items() if value.is_floating_point()}
        half = all(bool(value.isfinite().all()) for value in halves.values())
        path = self._record(number).with_suffix(".safetensors")
        save_tensors(path, tensors | halves if half else tensors)
        rows, size = len(next(iter(tensors.values()))), path.stat().st_size
        shard = Shard(path.name, rows, file_digest(path), size, "float16" if half else "float32", broken)
        write_json(self._record(number), shard)

    def _complete(self, index: Index) -> None:
        """List all shards in the index, and remove their own records."""
        name, count = str(self.directory), index.shard_count
        shards = [shard for number in range(count) if (shard := self._shard(index, number)) is not None]
        if len(shards) < count:
            raise UsageError(f"{name!r} lacks {count - len(shards)} of {count} shards; start again to encode them.")
        if not any(shard.rows for shard in shards):
            raise UsageError(f"{name!r}: none of the data could be read; repair them and start again.")
        if shards != index.shards:  # the bytes of an index have a digest that runs compare
            write_json(self.directory / INDEX, replace(index, format=FORMAT, shards=shards))
        for number in range(count):
            self._record(number).unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a dataclass as JSON, in place of the file as a whole."""
    write_text(path, json.dumps(to_mapping(value), indent=1) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as a safetensors file, in place of the file as a whole."""
    save = require("safetensors.torch").save_file
    with replaced(path) as part:
        save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, part, metadata=metadata)

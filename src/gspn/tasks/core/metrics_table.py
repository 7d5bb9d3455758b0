"""``metrics.csv``: one row per epoch, in a table that survives a kill."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..._errors import UsageError
from ..._files import printable, read_text, write_text


def metric(shown: str = "") -> Any:
    """A column of a task's row, for ``dataclasses``: None, and an empty cell, where it was not measured.

    ``shown`` is its format in the line that is printed after an epoch, such as ``"eval {:.4f}"``; empty: not printed.
    """
    return field(default=None, metadata={"shown": shown})


@dataclass(frozen=True)
class EpochRow:
    """The columns of ``metrics.csv`` that every task has; a task's row adds its metrics."""

    epoch: int
    """Epochs completed."""
    step: int
    """Updates completed."""
    lr: float
    """Learning rate of the epoch's last update, for layers whose rate is not reduced."""
    train_loss: float
    """Mean over the epoch's images, as augmented and mixed."""
    seconds: float
    """Time of the epoch's updates, without evaluation and checkpoints."""
    images_per_second: float
    peak_memory_mib: float
    """Peak memory: allocated on the CUDA device, else occupied by the process."""
    broken_images: int
    """Images of the epoch that could not be read; others took their place."""

    def shown_metrics(self) -> list[str]:
        """The metrics that were measured, as they are printed after an epoch."""
        shown = ((one.metadata.get("shown"), getattr(self, one.name)) for one in fields(self))
        return [text.format(value) for text, value in shown if text and value is not None]


Row = TypeVar("Row", bound=EpochRow)


class MetricsTable(Generic[Row]):
    """The table, replaced as a whole after each epoch, so that a kill leaves the old table or the new one."""

    def __init__(self, path: Path, row: type[Row]) -> None:
        self.path, self.row, self._names = path, row, [one.name for one in fields(row)]
        self._rows: list[dict[str, str]] = []
        if path.exists():
            self._rows = self._read()

    def _read(self) -> list[dict[str, str]]:
        try:
            reader = csv.DictReader(io.StringIO(read_text(self.path), newline=""))
            rows = list(reader)
            if reader.fieldnames != self._names or any(None in row for row in rows):
                raise ValueError(f"its columns are not {', '.join(self._names)}")
            for row in rows:
                self._parsed(row)
        except (csv.Error, ValueError, TypeError) as error:
            raise UsageError(
                f"{printable(self.path)!r} is damaged ({type(error).__name__}: {printable(error)}); restore it, or "
                "remove it to go on without the rows so far."
            ) from None
        return rows

    def last(self) -> Row | None:
        """The last row, or None."""
        return self._parsed(self._rows[-1]) if self._rows else None

    def _parsed(self, row: dict[str, str]) -> Row:
        values = {}
        for one in fields(self.row):
            text = row[one.name]
            kind = int if one.type == "int" else float
            values[one.name] = None if text == "" and one.default is None else kind(text)
        return self.row(**values)

    def forget_after(self, step: int) -> None:
        """Drop the rows after update ``step``, which a resumed run computes again."""
        kept = [row for row in self._rows if int(row["step"]) <= step]
        if len(kept) < len(self._rows):
            self._rows = kept
            self.write()

    def append(self, row: Row) -> None:
        """Add a row."""
        values = asdict(row).items()
        self._rows.append({key: "" if v is None else str(v) if isinstance(v, int) else f"{v:.9g}" for key, v in values})
        self.write()

    def write(self) -> None:
        """Write all rows."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self._names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self.path, text.getvalue())

"""The kind of app that the command and its groups are: errors in one line, other libraries quiet."""

from __future__ import annotations

import importlib
import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from gspn._errors import UsageError

from .messages import one_line_errors, warn

# Read by these libraries when they are imported, which commands do late.
_QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
_OTHERS = r"(accelerate|diffusers|huggingface_hub|timm|torch|torchmetrics|torchvision|transformers)(\.|$)"


class App(typer.Typer):
    """A group of commands; whatever a person got wrong ends each of them in one line, and a bug in its traceback."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cls=_Group, no_args_is_help=True, pretty_exceptions_show_locals=False, **options)

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        """A decorator that adds a command."""
        return super().command(name, cls=_Command, **options)


class _Group(TyperGroup):
    def make_context(self, info_name: str | None, args: list[str], *others: Any, **options: Any) -> Any:
        with one_line_errors():
            if any("\0" in one for one in args):
                raise UsageError("an argument has a NUL character, which no name of a file can have.")
            return super().make_context(info_name, args, *others, **options)

    def invoke(self, ctx: Any) -> Any:
        with own_output(), one_line_errors():
            return super().invoke(ctx)


class _Command(TyperCommand):
    def invoke(self, ctx: Any) -> Any:
        for parameter in self.params:
            value = ctx.params.get(parameter.name)
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, float) and not math.isfinite(one):
                    raise UsageError(f"{parameter.opts[0]} is {one}; it has to be a finite number.")
                if isinstance(one, int) and abs(one) >= 2**63:
                    raise UsageError(f"{parameter.opts[0]} is {one}; it has to be less than 2^63.")
        return super().invoke(ctx)


@contextmanager
def own_output() -> Iterator[None]:
    """Let nothing but the command's own lines appear, and let no name that cannot be encoded end it."""
    added = _QUIET.keys() - os.environ.keys()
    os.environ.update({name: _QUIET[name] for name in added})
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings(), _no_foreign_bars():
        warnings.filterwarnings("ignore", module=_OTHERS)
        said = set[str]()

        def show(message: Warning | str, *_: Any, **__: Any) -> None:
            if os.environ.get("RANK", "0") == "0" and str(message) not in said:  # once, however many processes see it
                said.add(str(message))
                warn(str(message))

        warnings.showwarning = show
        try:
            yield
        finally:
            for name in added:
                os.environ.pop(name, None)


@contextmanager
def _no_foreign_bars() -> Iterator[None]:
    """Without the progress bars of tqdm, which most libraries use and none lets switch off for all."""
    try:
        tqdm: Any = importlib.import_module("tqdm").tqdm
    except ImportError:
        yield
        return
    original = tqdm.__init__
    tqdm.__init__ = partialmethod(original, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = original

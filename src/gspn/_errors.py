"""Errors for users: a request that cannot be met, and a package that is not installed."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UsageError(ValueError):
    """A request that cannot be met; its message is one line with the value and the remedy.

    The command line shows it without a traceback. Any other exception is a bug and keeps its traceback.
    """


class MissingExtraError(ImportError):
    """A package of an optional extra is not installed; the message is the line that installs it."""


class ProcessLostError(RuntimeError):
    """A process that shares the work has ended, or does not answer; the message is one line.

    The command line shows it without a traceback, on every process: the first may be the one that has ended.
    """


def require(*modules: str, extra: str = "train") -> ModuleType:
    """Import ``modules`` and return the first.

    Raises:
        MissingExtraError: one of them is not installed; the message names the extra of gspn that installs it.

    Example:
        >>> require("json").__name__
        'json'
        >>> require("no_such_package")
        Traceback (most recent call last):
        gspn._errors.MissingExtraError: this needs no_such_package; pip install 'gspn[train]'
    """
    imported = []
    for name in modules:
        try:
            imported.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != name.partition(".")[0]:
                raise  # the package is installed and lacks a dependency of its own
            raise MissingExtraError(f"this needs {name}; pip install 'gspn[{extra}]'") from None
    return imported[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` where one of ``known`` is close to ``name``, else an empty string.

    Example:
        >>> nearest("epoch", ["epochs", "name"])
        "; did you mean 'epochs'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""

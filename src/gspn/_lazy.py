"""Exports that are imported when they are first used, for packages whose modules need optional extras."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def lazy_exports(
    package: str, homes: Mapping[str, str], eager: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package whose names are imported when they are first used.

    Args:
        package: The package's ``__name__``.
        homes: The module of each name, relative to the package.
        eager: The names that the package imports itself, for ``dir()``.

    Returns:
        Functions to assign to ``__getattr__`` and ``__dir__`` (PEP 562).

    Example:
        >>> get, names = lazy_exports("gspn", {"affinity_matrix": ".analysis"})
        >>> get("affinity_matrix").__name__, names()
        ('affinity_matrix', ['affinity_matrix'])
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name], package), name)

    return get, lambda: sorted({*homes, *eager})

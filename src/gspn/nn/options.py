"""Checks of the options of a model, which may come from the ``config.json`` of a file that somebody else wrote."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Literal

from .._files import short

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "count": (lambda one: isinstance(one, Integral) and int(one) >= 1, "an integer of at least 1"),
    "fraction": (lambda one: isinstance(one, Real) and 0 <= float(one) <= 1, "a number from 0 to 1"),
    "flag": (lambda one: isinstance(one, bool), "True or False"),  # a text such as "false" would count as true
}


def check_options(kind: Literal["count", "fraction", "flag"], /, **values: object) -> None:
    """Raise unless each value is of a kind: a number of things, a probability, or True or False.

    Raises:
        ValueError: One is not; the message names it.

    Example:
        >>> check_options("count", dim=16)
        >>> check_options("count", dim=True)
        Traceback (most recent call last):
        ValueError: dim=True: has to be an integer of at least 1.
    """
    fits, what = _RULES[kind]
    for name, value in values.items():
        # JSON's true is not the number 1.
        if not fits(value) or (kind != "flag" and isinstance(value, bool)):
            raise ValueError(f"{name}={short(value)}: has to be {what}.")

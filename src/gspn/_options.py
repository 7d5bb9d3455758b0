"""Checks of the options of a model, which may come from the ``config.json`` of a file that somebody else wrote."""

from __future__ import annotations

from numbers import Integral, Real

from ._files import printable


def check_integers(least: int = 1, /, **values: object) -> None:
    """Raise unless each value is an integer of at least ``least``.

    Raises:
        ValueError: One is not; the message names it.

    Example:
        >>> check_integers(dim=16)
        >>> check_integers(dim=True)
        Traceback (most recent call last):
        ValueError: dim=True: has to be an integer of at least 1.
    """
    for name, value in values.items():
        # JSON's true is not the number 1.
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{_shown(name, value)}: has to be an integer of at least {least}.")


def check_fractions(**values: object) -> None:
    """Raise unless each value is a number from 0 to 1, as probabilities are.

    Raises:
        ValueError: One is not; the message names it.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
            raise ValueError(f"{_shown(name, value)}: has to be a number from 0 to 1.")


def check_flags(**values: object) -> None:
    """Raise unless each value is True or False; a text such as ``"false"`` would count as true.

    Raises:
        ValueError: One is not; the message names it.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{_shown(name, value)}: has to be True or False.")


def _shown(name: str, value: object) -> str:
    return f"{name}={printable(repr(value))[:80]}"

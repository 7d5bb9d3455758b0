"""The recipes that come with the package: one YAML file each."""

from __future__ import annotations

from importlib.resources import files

from ...errors import UsageError, nearest


def recipe_names() -> list[str]:
    """The names of the recipes, sorted.

    Example:
        >>> "digits_pico" in recipe_names()
        True
    """
    return sorted(one.name.removesuffix(".yaml") for one in files(__name__).iterdir() if one.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a recipe, whose first comment says what it is.

    Raises:
        UsageError: there is no recipe of that name.
    """
    known = recipe_names()
    if name not in known:
        hint = nearest(name, known) or f"; recipes: {', '.join(known)}"
        raise UsageError(f"{name!r} is neither a file nor a recipe{hint}")
    return (files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")


def recipe_title(name: str) -> str:
    """The recipe's first comment line."""
    first = recipe_text(name).partition("\n")[0]
    return first.lstrip("# ").strip()

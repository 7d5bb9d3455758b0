"""The names of splits, by one rule for all data sets."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

TRAIN = ("train", "training")
VAL = ("val", "valid", "validation", "eval", "evaluation")
SPLIT_NAMES = (*TRAIN, *VAL, "test")
"""The usual names of splits, by which a folder or a shard is recognized as one."""


def split_names(split: str) -> tuple[str, ...]:
    """All names of a split, the requested one first.

    Raises:
        ValueError: the name is a path.

    Example:
        >>> split_names("validation")
        ('validation', 'val', 'valid', 'eval', 'evaluation')
    """
    if split in ("", ".", "..") or "/" in split or "\\" in split:
        raise ValueError(f"{split=} is not a name of a split; pass 'train', 'val', 'test', another name, or 'all'.")
    return tuple(dict.fromkeys((split, *next((names for names in (TRAIN, VAL) if split in names), ()))))


def find_split(split: str, present: Collection[str], source: str) -> str:
    """Find a split among those that a source has.

    - ``"train"`` and ``"training"`` are one split, and so are ``"val"``, ``"valid"``, ``"validation"``, ``"eval"`` and
      ``"evaluation"``. ``"test"`` and any other name stand only for themselves.
    - ``"all"`` is the whole source, whatever its splits.
    - A source without splits is ``"train"`` as a whole. It has no other split, because that would be the images that a
      model is trained on.

    Args:
        split: the requested split.
        present: the names of the splits that the source has; empty if it is not divided.
        source: the name of the source, for the error.

    Returns:
        The name among ``present``, or ``"all"`` for the whole source.

    Raises:
        ValueError: the source does not have this split, or the name is a path.

    Example:
        >>> find_split("val", ["train", "validation"], "the folder")
        'validation'
        >>> find_split("train", [], "the folder")
        'all'
    """
    names = split_names(split)
    if split == "all" or (not present and split in TRAIN):
        return "all"
    for name in names:
        if name in present:
            return name
    if present:
        has = f"it has {', '.join(map(repr, present))}, and 'all' for everything"
    else:
        has = "it is not divided into splits; pass 'train' or 'all' for everything"
    raise ValueError(f"{split=} is not a split of {source}: {has}.")


def choose_split(split: str, has: Callable[[str], bool], source: str) -> str:
    """Find a split by :func:`find_split` in a source that tells of a name whether it has that folder."""
    return find_split(split, [name for name in dict.fromkeys((*split_names(split), *SPLIT_NAMES)) if has(name)], source)


def split_folder(root: Path, split: str) -> Path:
    """Find the folder of a split by the rule of :func:`find_split`; ``root`` itself is the whole source.

    Raises:
        ValueError: ``root`` does not have this split or is not a folder.
    """
    if not root.is_dir():
        raise ValueError(f"root={str(root)!r} is not a folder.")
    name = choose_split(split, lambda name: (root / name).is_dir(), f"root={str(root)!r}")
    return root if name == "all" else root / name

"""Data sets by name."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gspn.data.base import LabelledImages
from gspn.data.digits import Digits, MNIST5k
from gspn.data.emoji import Emoji

if TYPE_CHECKING:
    from gspn.data.timm_datasets import Stream  # brings timm along

_BUILT_IN: dict[str, Callable[..., LabelledImages]] = {
    "emoji": lambda split, **options: Emoji(split, "category", **options),
    "emoji/subcategory": lambda split, **options: Emoji(split, "subcategory", **options),
    "digits": Digits,
    "mnist5k": MNIST5k,
}
# Prefix: the module that timm needs for it, and how it is installed.
_PREFIXES = {
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "wds": ("webdataset", "webdataset"),
    "tfds": ("tensorflow_datasets", "tensorflow tensorflow-datasets"),
    "torch": ("torchvision", "torchvision"),
}
DATASETS = tuple(_BUILT_IN)
"""The data sets that need no root."""


def open_dataset(
    name: str, split: str, root: str | os.PathLike[str] | None = None, **options: Any
) -> LabelledImages | Stream:
    """Open a data set by name.

    ======================  ==================================================================================
    ``"emoji"``             ``Emoji``, 9 categories
    ``"emoji/subcategory"`` ``Emoji``, 98 subcategories
    ``"digits"``            ``Digits``
    ``"mnist5k"``           ``MNIST5k``
    ``"folder"`` or ``""``  ``root/train/<class>/*`` and ``root/val/<class>/*``, or a tar of class folders
    ``"hfds/<name>"``       a data set of the Hugging Face hub, ``root`` its cache
    ``"wds/<name>"``        WebDataset shards in ``root``: a stream; also ``"hfids/<name>"`` and ``"tfds/<name>"``
    ``"torch/<name>"``      one that torchvision knows: ``"torch/cifar10"`` in ``root``, ``download=True`` fetches it
    ======================  ==================================================================================

    The lower half is what ``timm.data.create_dataset`` opens. Files are opened by ``load_image``.

    Args:
        name: see above.
        split: ``"train"``, ``"val"`` and their usual other names; for ``hfds/``, ``wds/`` whatever the data set has.
        root: where the data is, for those that do not ship.
        **options: ``transform``, for all. For folders ``classes`` (names in the order of the targets: pass those of the
            training split, so that a folder missing from one split shifts nothing), ``max_pixels`` and
            ``search_split=False`` (open the root itself). The rest goes to timm.

    Returns:
        A map-style data set of ``(image, target)``, or a stream of them, with ``classes``, ``name`` and ``transform``.

    Raises:
        ValueError: the name is unknown, the root is missing or holds no such split, or the split is unknown.
        ImportError: the package behind the name is not installed.

    Example:
        >>> from gspn.data import open_dataset
        >>> open_dataset("emoji", "train")
        <emoji: 1546 images, 9 classes>
    """
    if name in _BUILT_IN:
        if root is not None:
            raise ValueError(f"{root=} has no meaning for {name!r}, which needs none; leave it out.")
        return _BUILT_IN[name](split, **options)
    prefix, separator, rest = name.partition("/")
    prefix = prefix.lower()
    if name not in ("", "folder") and not (prefix in _PREFIXES and separator and rest):
        raise ValueError(_unknown(name))
    _need("timm", "timm", name)
    from gspn.data.timm_datasets import open_folder, open_with_timm

    if name in ("", "folder"):
        return open_folder(split, root, **options)
    _need(*_PREFIXES[prefix], name)
    if prefix in ("torch", "wds") and root is None:
        raise ValueError(f"{root=}: {name!r} needs root, the folder that holds the data.")
    return open_with_timm(name, split, root, **options)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, DATASETS, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    known = ", ".join([*map(repr, DATASETS), "'folder'", *(f"'{prefix}/<name>'" for prefix in _PREFIXES)])
    return f"{name=} is no data set.{meant} There are {known}. A folder of your own is name='folder' with root=..."


def _need(module: str, packages: str, name: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"The data set {name!r} needs {module}, which is not installed: pip install {packages}")

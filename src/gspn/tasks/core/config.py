"""Configurations: nested frozen dataclasses read from YAML, changed by ``section.key=value``, and written as YAML.

An unknown key and a value of the wrong type or out of range are refused with the key's path and the nearest known name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import types
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from ..._errors import UsageError, nearest, require
from ..._files import short

T = TypeVar("T")

# YAML 1.1, which PyYAML follows, takes 1e-3 for a string: a float needs a point there.
_MOST_VALUES, _MOST_NESTED = 100_000, 16  # of a configuration
_LONGEST_NAME = 4096  # letters

_FLOAT = re.compile(r"^[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$")


def setting(
    default: Any, least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf,
    below: float = math.inf, free: bool = False,
) -> Any:  # fmt: skip
    """A field of a section, for ``dataclasses``.

    A number, and each of a list, has to lie in ``[least, most]``, and between ``above`` and ``below`` without being
    either; None always passes. The value of a ``free`` one changes neither weights nor metrics, so it may differ when a
    run is resumed.
    """
    return dataclasses.field(default=default, metadata={"range": (least, most, above, below), "free": free})


def settings(config: Any, parent: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Every field of nested dataclasses that is not a dataclass itself: its dotted key, the field, and its value."""
    for field in dataclasses.fields(config):
        value, key_path = getattr(config, field.name), f"{parent}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{key_path}.")
        else:
            yield key_path, field, value


def from_mapping(cls: type[T], values: Mapping[str, Any], parent: str = "") -> T:
    """Build the dataclass ``cls`` from nested mappings, checking names and types; missing keys take their defaults.

    Its fields are numbers, strings, paths, ``Literal``, lists, fixed tuples, mappings, other dataclasses, or unions of
    these. Messages name keys with ``parent``, the key path of ``values``, before them.

    Raises:
        UsageError: an unknown key, a missing one without default, or a value of the wrong type.

    Example:
        >>> @dataclasses.dataclass
        ... class Optim:
        ...     lr: float = 1e-3
        >>> from_mapping(Optim, {"lr": "5e-4"})
        Optim(lr=0.0005)
        >>> from_mapping(Optim, {"rl": 5e-4})
        Traceback (most recent call last):
        gspn._errors.UsageError: unknown configuration key 'rl'; did you mean 'lr'?
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{parent or 'the configuration'} is {short(values)}, not a mapping of keys to values.")
    hints = _hints(cls)
    fields = {field.name: field for field in dataclasses.fields(typing.cast("Any", cls))}
    built = {}
    for key, value in values.items():
        key_path = f"{parent}.{key}" if parent else str(key)
        if key not in fields:
            raise UsageError(f"unknown configuration key {short(key_path)}{_nearest_key(str(key), hints, parent)}")
        built[key] = _converted(hints[key], value, key_path)
        if "range" in fields[key].metadata:
            check_range(key_path, built[key], *fields[key].metadata["range"])
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in built:
            raise UsageError(f"{f'{parent}.{name}' if parent else name} is missing; set it.")
    return cls(**built)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def to_mapping(value: Any) -> Any:
    """A nested dataclass as plain mappings, lists, numbers and strings, which YAML and JSON can hold."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_mapping(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_mapping(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_mapping(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def assigned(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of nested mappings with ``value`` at the dotted ``key``.

    Example:
        >>> assigned({"optim": {"lr": 1, "eps": 2}}, "optim.lr", 3)
        {'optim': {'lr': 3, 'eps': 2}}
    """
    name, _, rest = key.partition(".")
    if rest:
        inner = values.get(name)
        value = assigned(inner if isinstance(inner, Mapping) else {}, rest, value)
    return {**values, name: value}


def parse_override(text: str) -> tuple[str, Any]:
    """``"optim.lr=1e-3"`` as ``("optim.lr", 0.001)``; the value is read as YAML.

    Raises:
        UsageError: there is no ``=``, no key before it, or no YAML after it.

    Example:
        >>> parse_override("augment.scale=[0.8, 1.0]")
        ('augment.scale', [0.8, 1.0])
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")) or key.count(".") > _MOST_NESTED:
        raise UsageError(f"{short(text)} is not of the form section.key=value, such as optim.lr=1e-3.")
    return key, read_yaml(value, f"the value of {key}")


def read_yaml(text: str, what: str) -> Any:
    """``text`` as YAML, safely, with ``1e-3`` as a number.

    Raises:
        UsageError: it is not YAML, a mapping has a key twice, or aliases make it too large.
    """
    yaml = require("yaml")

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [one.value for one, _ in node.value if isinstance(one, yaml.ScalarNode) and one.value != "<<"]
            twice = [key for key, count in Counter(keys).items() if count > 1]
            if twice:
                problem = f"the key {twice[0]!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    try:
        value = yaml.load(text, Loader=Loader)
        _check_size(value, {})
    except yaml.YAMLError as error:
        raise UsageError(f"{what} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UsageError(f"{what} is not YAML that can be read: it is nested too deeply.") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        # PyYAML's errors for values that are not of the kind they look like, as the date 2026-99-99 or `!!bool x`.
        raise UsageError(f"{what} is not YAML: {type(error).__name__}: {error}") from None
    return value


def _check_size(value: Any, sizes: dict[int, int]) -> int:
    """The number of values in a tree whose branches may be one object by YAML's aliases; refuses one that explodes."""
    if not isinstance(value, Mapping | list | tuple | set):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = _MOST_VALUES  # of a branch that contains itself
        inner = value.values() if isinstance(value, Mapping) else value
        sizes[id(value)] = 1 + sum(_check_size(one, sizes) for one in inner)
    if sizes[id(value)] > _MOST_VALUES:
        raise ValueError(f"with its aliases written out it has more than {_MOST_VALUES:,} values, or never ends")
    return sizes[id(value)]


def write_yaml(config: Any) -> str:
    """The configuration as YAML, in the order of its fields."""
    yaml = require("yaml")
    return yaml.safe_dump(to_mapping(config), sort_keys=False, width=100, allow_unicode=True)


def flat(mapping: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys.

    Example:
        >>> flat({"optim": {"lr": 1}})
        {'optim.lr': 1}
    """
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        key_path = f"{parent}.{key}" if parent else key
        out.update(flat(value, key_path) if isinstance(value, Mapping) and value else {key_path: value})
    return out


def check_choice(key_path: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse a value that is not one of ``choices``."""
    choices = list(choices)
    known = [str(one) for one in choices]
    if value not in choices or isinstance(value, bool):
        raise UsageError(f"{key_path} is {short(value)}, not one of {', '.join(known)}{nearest(str(value), known)}")


def check_range(
    key_path: str, value: Any, least: float = -math.inf, most: float = math.inf, above: float = -math.inf,
    below: float = math.inf,
) -> None:  # fmt: skip
    """Refuse a number that is not finite or out of the range of :func:`setting`; others, such as None, pass."""
    if isinstance(value, list | tuple | Mapping):
        named = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, one in named:
            check_range(f"{key_path}[{name}]", one, least, most, above, below)
    if not isinstance(value, int | float) or (
        math.isfinite(value) and least <= value <= most and above < value < below
    ):
        return
    limits = [f"at least {least:g}"] * (least > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
    limits += [f"at most {most:g}"] * (most < math.inf) + [f"below {below:g}"] * (below < math.inf)
    both = f"between {least:g} and {most:g}" if least > -math.inf and most < math.inf else " and ".join(limits)
    raise UsageError(f"{key_path} is {value:g}; it has to be {both or 'a finite number'}.")


# --- One value --------------------------------------------------------------------------------------------------------


def _converted(hint: Any, value: Any, key_path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        errors = []
        for one in arguments:
            if one is type(None):
                continue
            try:
                return _converted(one, value, key_path)
            except UsageError as error:
                errors.append(error)
        # One alternative: its own message is the more exact one.
        raise errors[0] if len(errors) == 1 else _wrong(hint, value, key_path)
    if origin is Literal:
        for one in arguments:
            if value == one and type(value) is type(one):
                return value
        check_choice(key_path, value, arguments)
    if dataclasses.is_dataclass(hint):
        return value if dataclasses.is_dataclass(value) else from_mapping(typing.cast("type", hint), value, key_path)
    if origin in (tuple, list):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise _wrong(hint, value, key_path)
        hints = arguments if origin is tuple else arguments * len(value)
        if len(hints) != len(value):
            raise _wrong(hint, value, key_path)
        return origin(_converted(*one, f"{key_path}[{i}]") for i, one in enumerate(zip(hints, value, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(hint, value, key_path)
        return {str(key): _converted(arguments[1], v, f"{key_path}.{key}") for key, v in value.items()}
    return _scalar(hint, value, key_path)


def _scalar(hint: type, value: Any, key_path: str) -> Any:
    if isinstance(value, bool):
        if hint is not bool:
            raise _wrong(hint, value, key_path)
        return value
    if hint is Path and isinstance(value, str | Path | int) and str(value):
        return Path(_name(str(value), key_path))
    if hint is str and isinstance(value, str | int):  # 1.10 would lose its 0
        return _name(str(value), key_path)
    if hint in (int, float) and isinstance(value, str | int | float):
        number = _number(value)
        if isinstance(number, int) or math.isfinite(number):
            if abs(number) >= 2**63:
                raise UsageError(f"{key_path} is {short(value)}, which is too large a number.")
            if hint is float or number == int(number):
                return hint(number)
    raise _wrong(hint, value, key_path)


def _number(value: str | float) -> int | float:
    """The number that a value is, or that a text says; not a number if there is none."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return math.nan


def _name(text: str, key_path: str) -> str:
    """Refuse a text that no file, data set or model can have as its name."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise UsageError(f"{key_path} is {short(text)}, which is not text.") from None
    if len(text) > _LONGEST_NAME:
        raise UsageError(
            f"{key_path} is {short(text)}, of {len(text):,} letters; at most {_LONGEST_NAME:,} can be used."
        )
    if "\0" in text:
        raise UsageError(f"{key_path} is {short(text)}; the NUL character cannot be in it.")
    return text


def _wrong(hint: Any, value: Any, key_path: str) -> UsageError:
    return UsageError(f"{key_path} is {short(value)}; it has to be {_type_words(hint)}.")


def _type_words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_words(one) for one in arguments)
    if origin is tuple:
        return f"a list of {len(arguments)}: {', '.join(_type_words(one) for one in arguments)}"
    if origin is list:
        return f"a list, each {_type_words(arguments[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    if hint is type(None):
        return "null"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", Path: "a path"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _nearest_key(key: str, hints: Mapping[str, Any], parent: str) -> str:
    """The key that was probably meant: in this section, or (`lr` for `optim.lr`) one section further down."""
    known = list(hints)
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            known += [f"{name}.{field.name}" for field in dataclasses.fields(hint)]
    exact = [name for name in known if name.rpartition(".")[2] == key]
    if exact:
        return f"; did you mean {exact[0]!r}?"
    return nearest(key, known) or f"; {parent or 'the configuration'} has {', '.join(hints)}"

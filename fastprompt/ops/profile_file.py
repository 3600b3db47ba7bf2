"""The file of a profile: what it holds, written at once or not at all, and read with every field checked."""

from __future__ import annotations

import importlib
import json
import math
import os
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastprompt.ops.attention_choice import Way

FORMAT = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Measurement:
    """The times of one shape of attention, in microseconds by way; `refused`: why other ways have none."""

    dtype: str
    head_dim: int
    queries: int
    keys: int
    prompts: int
    temperature: bool
    backward: bool
    batch: int
    heads: int
    microseconds: dict[Way, float]
    refused: dict[Way, str] = field(default_factory=dict)

    @property
    def fastest(self) -> Way:
        """The way with the smallest time."""
        return min(self.microseconds, key=self.microseconds.__getitem__)

    @property
    def shape(self) -> tuple[Any, ...]:
        """All but the results."""
        return tuple(getattr(self, f.name) for f in fields(self)[:9])


@dataclass(frozen=True)
class Tile:
    """An entry for the table of `operation`, and its time in microseconds."""

    operation: str
    key: dict[str, Any]
    config: dict[str, Any]
    microseconds: float


@dataclass
class Profile:
    """The contents of a file. `machine`: the GPU and the versions, by name, see :func:`machine`."""

    machine: dict[str, str]
    ways: list[Measurement] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)

    def add(self, found: Measurement | Tile) -> None:
        """Add a result in place of an older one of the same shape or entry."""
        if isinstance(found, Measurement):
            self.ways = [*(m for m in self.ways if m.shape != found.shape), found]
        else:
            same = (found.operation, found.key)
            self.tiles = [*(t for t in self.tiles if (t.operation, t.key) != same), found]


class ProfileError(ValueError):
    """A profile that cannot be used; the message names file, field and value."""


def write(profile: Profile, file: Path) -> None:
    """Write `profile` to `file` at once or not at all, and make its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps({"format": FORMAT, **asdict(profile)}, indent=1) + "\n", encoding="utf-8")
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def read(file: Path) -> Profile:
    """Return the profile in `file`, of whatever machine.

    Raises:
        ProfileError: it is no profile; the message names the first field that is wrong.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ProfileError(f"{file}: {error}") from error
    try:
        _fields(data, "", {"format": int, "machine": dict, "ways": list, "tiles": list})
        if data["format"] != FORMAT:
            raise ProfileError(f"format must be {FORMAT}; got {data['format']}")
        _values(data["machine"], "machine", str)
        ways = [_measurement(m, f"ways[{i}]") for i, m in enumerate(data["ways"])]
        tiles = [_tile(t, f"tiles[{i}]") for i, t in enumerate(data["tiles"])]
    except ProfileError as error:
        raise ProfileError(f"{file}: {error}") from None
    return Profile(data["machine"], ways, tiles)


_MEASUREMENT: dict[str, type] = {
    "dtype": str,
    "head_dim": int,
    "queries": int,
    "keys": int,
    "prompts": int,
    "temperature": bool,
    "backward": bool,
    "batch": int,
    "heads": int,
    "microseconds": dict,
    "refused": dict,
}
_TILE: dict[str, type] = {
    "operation": str,
    "key": dict,
    "config": dict,
    "microseconds": float,
}


def _measurement(data: Any, where: str) -> Measurement:
    _fields(data, where, _MEASUREMENT)
    for name in ("head_dim", "queries", "keys", "prompts", "batch", "heads"):
        if data[name] < (0 if name == "prompts" else 1):
            raise ProfileError(f"{where}.{name} must be positive; got {data[name]}")
    if data["dtype"] not in DTYPES:
        raise ProfileError(f"{where}.dtype must be one of {', '.join(DTYPES)}; got {data['dtype']!r}")
    if not data["microseconds"]:
        raise ProfileError(f"{where}.microseconds must hold a time; got {{}}")
    for name, value in data["microseconds"].items():
        _way(name, f"{where}.microseconds")
        _time(value, f"{where}.microseconds.{name}")
    for name in data["refused"]:
        _way(name, f"{where}.refused")
    _values(data["refused"], f"{where}.refused", str)
    return Measurement(**data)


def _tile(data: Any, where: str) -> Tile:
    _fields(data, where, _TILE)
    _time(data["microseconds"], f"{where}.microseconds")
    try:
        entry(data["operation"], data["key"], data["config"])
    except ProfileError as error:
        raise ProfileError(f"{where}: {error}") from None
    return Tile(**data)


def _fields(data: Any, where: str, types: Mapping[str, type]) -> None:
    """Check that `data` has the fields of `types`, and no others."""
    if not isinstance(data, dict):
        raise ProfileError(f"{where or 'the file'} must be an object; got {data!r:.60}")
    dot = f"{where}." if where else ""
    for name in types.keys() ^ data.keys():
        raise ProfileError(f"{dot}{name} {'is missing' if name in types else 'is not a known field'}")
    for name, kind in types.items():
        value = data[name]
        right = isinstance(value, (int, float) if kind is float else kind)
        if not right or (isinstance(value, bool) and kind is not bool):
            raise ProfileError(f"{dot}{name} must be {kind.__name__}; got {value!r:.60}")


def _values(data: dict[str, Any], where: str, kind: type) -> None:
    for name, value in data.items():
        if not isinstance(value, kind):
            raise ProfileError(f"{where}.{name} must be {kind.__name__}; got {value!r:.60}")


def _way(name: str, where: str) -> None:
    from fastprompt.ops.attention_choice import WAYS  # which asks the profile

    if name not in WAYS:
        raise ProfileError(f"{where} has a way {name!r}; known are {', '.join(WAYS)}")


def _time(value: Any, where: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        raise ProfileError(f"{where} must be a positive number of microseconds; got {value!r:.60}")


# Tile sizes -----------------------------------------------------------------------------------------------------------


def tables() -> Iterator[tuple[str, ModuleType]]:
    """Yield each operation with a table of tile sizes, and the module that has it."""
    import fastprompt.kernels.triton as kernels

    for module in pkgutil.iter_modules(kernels.__path__):
        if module.name.endswith("_config"):
            name = module.name.removesuffix("_config")
            yield name, importlib.import_module(f"{kernels.__name__}.{module.name}")


def entry(operation: str, key: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[ModuleType, Any, Any]:
    """Return the module of `operation`, and key and configuration as its table has them.

    Raises:
        ProfileError: there is no such table, no such entry in it, or the configuration is none of its candidates.
    """
    modules = dict(tables())
    if operation not in modules:
        raise ProfileError(
            f"there is no table of tile sizes for {operation!r}; known are {', '.join(modules)}"
        )
    module = modules[operation]
    try:
        named, sizes = module.Key(**key), module.Config(**config)
    except TypeError as error:
        raise ProfileError(f"{operation}: {error}") from None
    if named not in module.TABLE:
        raise ProfileError(f"the table of {operation} has no entry {named}")
    if sizes != module.TABLE[named] and sizes not in module.candidates(named):
        raise ProfileError(f"{sizes} is no candidate for {named} of {operation}")
    return module, named, sizes

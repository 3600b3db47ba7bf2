"""The profile: what `fastprompt calibrate` measured on this machine's GPU, and how calls make use of it.

A profile is a JSON file with the times of the ways to compute attention, by shape, and with tile sizes that were faster
than those of the kernels' tables. It counts only where it was measured: on the same GPU, with the same versions of
fastprompt, torch, Triton and ptxas. Any other is ignored, and a warning says why.

It is read on the first call that asks for it, from `FASTPROMPT_PROFILE`, else from the user's cache folder. It only
chooses among exact forms; whether a kernel may run at all is not its business.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import pkgutil
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from fastprompt.kernels.triton.prompt_attention_config import ONE, RESIDENT_KEYS

VARIABLE = "FASTPROMPT_PROFILE"
NONE = "none"  # the variable's value for no profile at all
FORMAT = 1  # of the file
WAYS = ("resident", "looped", "split", "joined")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# A measurement stands for calls whose lengths differ from its own by at most this factor.
REACH = 1.5


class Call(Protocol):
    """What a call of attention is chosen by; `fastprompt.ops.attention_choice.Call` has more."""

    @property
    def capability(self) -> tuple[int, int] | None: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def queries(self) -> int: ...
    @property
    def keys(self) -> int: ...
    @property
    def prompts(self) -> int: ...
    @property
    def temperature(self) -> bool: ...
    @property
    def training(self) -> bool: ...


@dataclass(frozen=True)
class Measurement:
    """The times of one shape of attention, in microseconds by way; `refused`: why other ways have none."""

    dtype: str
    head_dim: int
    queries: int
    keys: int
    prompts: int
    temperature: bool
    training: bool
    batch: int
    heads: int
    microseconds: dict[str, float]
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def fastest(self) -> str:
        return min(self.microseconds, key=self.microseconds.__getitem__)

    @property
    def shape(self) -> tuple[Any, ...]:
        """All but the results."""
        return tuple(getattr(self, f.name) for f in fields(self)[:9])


@dataclass(frozen=True)
class Tile:
    """An entry for the table of `operation`; its time and that of the table's own, in microseconds."""

    operation: str
    key: dict[str, Any]
    config: dict[str, Any]
    microseconds: float
    before: float


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


# Where, and of what -------------------------------------------------------------------------------------------------


def default_path() -> Path:
    """Return the file in the user's cache folder for the current GPU, or for the CPU of a machine without one."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if folder := os.environ.get("XDG_CACHE_HOME"):
        cache = Path(folder)
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        cache = Path.home() / ".cache"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return cache / "fastprompt" / f"{slug}.json"


def path() -> Path | None:
    """Return the file that is read: of `FASTPROMPT_PROFILE`, else of the cache folder; None for "none"."""
    given = os.environ.get(VARIABLE, "").strip()
    if given.lower() == NONE:
        return None
    return Path(given).expanduser() if given else default_path()


@functools.cache
def machine() -> dict[str, str]:
    """Return what a profile must share with this process: the current GPU, and the versions that make its kernels."""
    found = {"device": "cpu", "capability": "none"}
    found |= {name: _version(name) for name in ("fastprompt", "torch", "triton")}
    found["ptxas"] = "none"
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        found["device"] = torch.cuda.get_device_name()
        found["capability"] = "{}.{}".format(*capability)
        found["ptxas"] = ptxas_version(capability)
    return found


def ptxas_version(capability: tuple[int, int]) -> str:
    """Return the version of the assembler that Triton uses for `capability`, or "none"."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas_version

        text = get_ptxas_version(10 * capability[0] + capability[1])
    except Exception:  # no Triton, or no assembler: nothing here is compiled
        return "none"
    found = re.search(r"V(\d+(?:\.\d+)+)", text)
    return found.group(1) if found else text.strip()


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


# The file -----------------------------------------------------------------------------------------------------------


def write(profile: Profile, file: Path) -> None:
    """Write `profile` to `file` at once or not at all, and make its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".part", delete=False) as draft:
        try:
            json.dump({"format": FORMAT, **asdict(profile)}, draft, indent=1)
            draft.write("\n")
            draft.close()
            os.replace(draft.name, file)
        except BaseException:
            Path(draft.name).unlink(missing_ok=True)
            raise


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
    "training": bool,
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
    "before": float,
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
    for name in ("microseconds", "before"):
        _time(data[name], f"{where}.{name}")
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
    if name not in WAYS:
        raise ProfileError(f"{where} has a way {name!r}; known are {', '.join(WAYS)}")


def _time(value: Any, where: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        raise ProfileError(f"{where} must be a positive number of microseconds; got {value!r:.60}")


# In force -----------------------------------------------------------------------------------------------------------


@functools.cache
def in_force() -> tuple[Profile | None, str]:
    """Return the profile that calls follow and its file's name, or None and the reason; read once, see :func:`forget`.

    Warns if there is a file that is not used.
    """
    file = path()
    if file is None:
        return None, f"{VARIABLE} is {NONE!r}"
    if not file.exists():
        reason = f"there is no {file}; `fastprompt calibrate` makes one"
        if os.environ.get(VARIABLE, "").strip():
            warnings.warn(f"fastprompt: {VARIABLE} is set, but {reason}", stacklevel=2)
        return None, reason
    try:
        found = read(file)
    except ProfileError as error:
        reason = str(error)
    else:
        wrong = why_other(found)
        if wrong is None:
            return found, str(file)
        reason = f"{file}: {wrong}"
    warnings.warn(
        f"fastprompt: the profile is ignored: {reason}; run `fastprompt calibrate` again, "
        f"or set {VARIABLE}={NONE}",
        stacklevel=2,
    )
    return None, reason


def why_other(profile: Profile) -> str | None:
    """Return in what a profile differs from this process, or None."""
    here = machine()
    other = [
        f"{name} is {here.get(name, 'unknown')} here, {profile.machine.get(name, 'unknown')} there"
        for name in sorted(here.keys() | profile.machine.keys())
        if here.get(name) != profile.machine.get(name)
    ]
    return f"it was measured elsewhere: {'; '.join(other)}" if other else None


def forget() -> None:
    """Read the profile again when it is next asked for. Tile sizes that are in force stay."""
    in_force.cache_clear()
    _nearest.cache_clear()
    apply_tiles.cache_clear()


def way(call: Call) -> str | None:
    """Return the way that was fastest for the measured shape nearest to `call`, or None if none is near.

    A measurement stands for `call` if it has the same kind of dtype (16-bit or float32) and of head_dim (up to 64, 128,
    more), of queries (a few or many), of keys (as many as a resident kernel holds or more), prompts or none, and
    `training`, and if its queries, keys and keys with prompts are within a factor of 1.5. Of those, one with the same
    use of a temperature comes first, then the nearest by lengths.
    """
    if call.dtype not in DTYPES.values():
        return None
    sizes = (call.queries, call.keys, call.prompts)
    return _nearest(call.capability, call.dtype, call.head_dim, *sizes, call.temperature, call.training)


@functools.lru_cache(maxsize=4096)
def _nearest(
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    queries: int,
    keys: int,
    prompts: int,
    temperature: bool,
    training: bool,
) -> str | None:
    profile, _ = in_force()
    known = "none" if capability is None else "{}.{}".format(*capability)
    if profile is None or known != profile.machine["capability"]:
        return None
    kind = _kind(dtype, head_dim, queries, keys, prompts, training)
    near: list[tuple[bool, float, int, str]] = []
    for m in profile.ways:
        if _kind(DTYPES[m.dtype], m.head_dim, m.queries, m.keys, m.prompts, m.training) != kind:
            continue
        lengths = ((queries, m.queries), (keys, m.keys), (keys + prompts, m.keys + m.prompts))
        off = [abs(math.log(max(a, 1) / b)) for a, b in lengths]
        if max(off) <= math.log(REACH):
            near.append((m.temperature != temperature, sum(off), len(near), m.fastest))
    return min(near)[-1] if near else None


def _kind(
    dtype: torch.dtype, head_dim: int, queries: int, keys: int, prompts: int, training: bool
) -> tuple[Any, ...]:
    width = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 0
    return dtype.itemsize, width, queries <= ONE, keys + prompts <= RESIDENT_KEYS, prompts > 0, training


# Tile sizes ---------------------------------------------------------------------------------------------------------


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


@functools.cache
def apply_tiles() -> None:
    """Put the tile sizes of the profile in force into the kernels' tables; once."""
    profile, _ = in_force()
    for tile in profile.tiles if profile is not None else ():
        module, key, config = entry(tile.operation, tile.key, tile.config)
        module.override(key, config)

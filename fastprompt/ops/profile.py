"""The profile: what `fastprompt calibrate` measured on this machine's GPU, and how calls make use of it.

A profile is a JSON file with the times of the ways to compute attention, by shape, and with tile sizes that were faster
than those of the kernels' tables. It counts only where it was measured: on the same GPU, with the same versions of
fastprompt, torch, Triton and ptxas. Any other is ignored, and a warning says why.

It is read on the first call that asks for it, from `FASTPROMPT_PROFILE`, else from the user's cache folder. It only
chooses among exact forms; whether a kernel may run at all is not its business.
"""

from __future__ import annotations

import functools
import math
import os
import re
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastprompt.ops.profile_file import DTYPES, Profile, ProfileError, entry, read

if TYPE_CHECKING:
    from fastprompt.ops.attention_choice import Call, Way

VARIABLE = "FASTPROMPT_PROFILE"
NONE = "none"  # the variable's value for no profile at all
# A measurement stands for calls whose lengths differ from its own by at most this factor.
REACH = 1.5


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
    way.cache_clear()
    apply_tiles.cache_clear()


@functools.lru_cache(maxsize=4096)
def way(call: Call) -> Way | None:
    """Return the way that was fastest for the measured shape nearest to `call`, or None if none is near.

    A measurement stands for `call` if it has the same kind of dtype (16-bit or float32) and of head_dim (up to 64, 128,
    more), of queries (a few or many), of keys (as many as a resident kernel holds or more), prompts or none, and
    direction, and if its queries, keys and keys with prompts are within a factor of 1.5. Of those, one with the same
    use of a temperature comes first, then the nearest by lengths. A backward for the prompts alone is not measured.
    """
    apply_tiles()  # attention's kernels come after
    profile, _ = in_force()
    capability = "none" if call.capability is None else "{}.{}".format(*call.capability)
    if profile is None or capability != profile.machine["capability"]:
        return None
    if call.dtype not in DTYPES.values() or call.only_prompts:
        return None
    kind = _kind(call.dtype, call.head_dim, call.queries, call.keys, call.prompts, call.backward)
    near: list[tuple[bool, float, int, Way]] = []
    for m in profile.ways:
        if _kind(DTYPES[m.dtype], m.head_dim, m.queries, m.keys, m.prompts, m.backward) != kind:
            continue
        total = call.keys + call.prompts
        lengths = (call.queries, m.queries), (call.keys, m.keys), (total, m.keys + m.prompts)
        off = [abs(math.log(max(a, 1) / b)) for a, b in lengths]
        if max(off) <= math.log(REACH):
            near.append((m.temperature != call.temperature, sum(off), len(near), m.fastest))
    return min(near)[-1] if near else None


def _kind(
    dtype: torch.dtype, head_dim: int, queries: int, keys: int, prompts: int, backward: bool
) -> tuple[Any, ...]:
    from fastprompt.ops.attention_choice import FEW_QUERIES, RESIDENT_KEYS  # it imports this module

    width = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 0
    return (
        dtype.itemsize,
        width,
        queries <= FEW_QUERIES,
        keys + prompts <= RESIDENT_KEYS,
        prompts > 0,
        backward,
    )


@functools.cache
def apply_tiles() -> None:
    """Put the tile sizes of the profile in force into the kernels' tables; once."""
    profile, _ = in_force()
    for tile in profile.tiles if profile is not None else ():
        module, key, config = entry(tile.operation, tile.key, tile.config)
        module.override(key, config)

"""A profile in words."""

from __future__ import annotations

from fastprompt.ops import profile


def shown() -> str:
    """Return the profile in force as lines of text, or why there is none."""
    found, where = profile.in_force()
    if found is None:
        return f"no profile is in force: {where}"
    lines = [f"{where} is in force", *(f"  {name} {value}" for name, value in found.machine.items())]
    lines += [f"ways of attention, {len(found.ways)} shapes:"]
    for m in found.ways:
        times = sorted(m.microseconds.items(), key=lambda item: item[1])
        lines.append(
            f"  {m.batch} x {m.heads} heads of {m.head_dim}, {m.keys}+{m.prompts} keys, {m.dtype}"
            f"{', temperature' if m.temperature else ''}, {'backward' if m.backward else 'forward'}: "
            + "; ".join(f"{way} {us:.1f} us" for way, us in times)
        )
    lines += [f"tile sizes, {len(found.tiles)} entries:"]
    for tile in found.tiles:
        key, config = (" ".join(f"{k}={v}" for k, v in d.items()) for d in (tile.key, tile.config))
        lines.append(f"  {tile.operation}, {key}: {config}, {tile.microseconds:.1f} us")
    return "\n".join(lines)

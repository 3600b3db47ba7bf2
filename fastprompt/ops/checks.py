"""Argument checks shared by the operations."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from fastprompt.ops.operator import autocast_enabled


def check_devices_and_dtypes(
    caller: str,
    name: str,
    tensor: Tensor,
    others: Mapping[str, Tensor | None],
    any_dtype: Collection[str] = (),
) -> None:
    """Raise unless `others` are on the device of `tensor` and, autocast off, in its floating dtype.

    Args:
        caller, name: the operation and the argument that the message names.
        others: the other tensors by name; None ones are ignored.
        any_dtype: names of those whose dtype is free (gates, temperatures, indices).

    Raises:
        ValueError: a tensor is on another device.
        TypeError: `tensor` is not floating point, or the dtype of another differs.
    """
    given = {n: t for n, t in others.items() if t is not None}
    for n, t in given.items():
        if t.device != tensor.device:
            raise ValueError(
                f"`{caller}`: `{n}` is on {t.device} and `{name}` on {tensor.device}; move it there"
            )
    if not tensor.is_floating_point():
        raise TypeError(f"`{caller}`: `{name}` must be floating point; got {tensor.dtype}; convert it")
    if autocast_enabled(tensor):
        return
    for n, t in given.items():
        if n not in any_dtype and t.dtype != tensor.dtype:
            raise TypeError(
                f"`{caller}`: `{n}` is {t.dtype} and `{name}` {tensor.dtype}; convert one of them"
            )


def check_one_element(caller: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` is a floating-point tensor of one element."""
    if tensor.numel() != 1 or not tensor.is_floating_point():
        raise ValueError(
            f"`{caller}`: `{name}` must be a floating-point tensor of one element; "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )

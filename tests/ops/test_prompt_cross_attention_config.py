"""How the Triton kernel of folded cross-attention cuts its columns, and what its table has for them."""

from __future__ import annotations

from itertools import product

import pytest

from fastprompt.kernels.triton import folded_cross_attention_config as config
from fastprompt.kernels.triton.folded_cross_attention_config import Columns, split

KERNELS = ("fwd", "bwd")


@pytest.mark.parametrize("H", [1, 2, 3, 5, 6, 7, 8, 12, 16, 24])
@pytest.mark.parametrize("P", [1, 2, 3, 5, 10, 16, 20, 24, 40, 50, 100])
def test_tiles_hold_all_columns_once_and_can_be_multiplied(H: int, P: int) -> None:
    columns = split(H, P)
    for (first, second), count in ((columns.heads, H), (columns.prompts, P)):
        assert first.bit_count() == 1
        assert second.bit_count() <= 1
        assert first + second >= count
        assert second == 0 or first < count, "a piece is all padding"
    sizes = [h * p for h, p in product(columns.heads, columns.prompts) if h * p]
    assert min(sizes) >= 16
    assert sum(sizes) == columns.total
    assert len(sizes) == columns.tiles


@pytest.mark.parametrize(
    ("H", "P", "expected"),
    [
        (12, 20, Columns((8, 4), (16, 4))),
        (12, 24, Columns((8, 4), (16, 8))),
        (12, 16, Columns((8, 4), (16, 0))),
        (16, 20, Columns((16, 0), (16, 4))),
        (6, 16, Columns((4, 2), (16, 0))),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_common_sizes_are_not_padded(H: int, P: int, expected: Columns) -> None:
    assert split(H, P) == expected
    assert expected.total == H * P


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("architecture", [0, 80, 90, 100])
def test_every_count_of_columns_up_to_the_limit_has_an_entry_with_room(
    architecture: int, itemsize: int
) -> None:
    limit = config.limit(architecture, itemsize)
    assert limit >= split(8, 16).total
    for kernel, columns in product(KERNELS, range(16, limit + 1, 16)):
        chosen = config.choose(architecture, kernel, columns, itemsize)
        room = [
            key[2]
            for key, entry in config.TABLE.items()
            if entry == chosen and key[:2] == (architecture, kernel)
        ]
        assert max(room) >= columns


def test_vit_b_with_twenty_prompts_is_served_on_hopper_and_later() -> None:
    assert all(config.limit(architecture, 2) >= split(12, 20).total for architecture in (90, 100))


@pytest.mark.parametrize("key", config.TABLE, ids=str)
def test_every_entry_is_among_what_is_measured(key: config.Key) -> None:
    candidates = config.candidates(key)
    assert len(set(candidates)) == len(candidates)
    assert key[0] == 0 or config.TABLE[key] in candidates


def test_wide_rows_are_read_in_smaller_steps() -> None:
    narrow, wide = (config.choose(90, "fwd", 160, 2, wide_rows) for wide_rows in (False, True))
    assert (wide.block_k, wide.block_m) == (narrow.block_k // 2, narrow.block_m)

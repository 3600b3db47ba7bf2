"""The model of bytes and operations counts what the operations count themselves, and tiles cover what they should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import ops, roofline

B, N, P, H, d = 2, 13, 5, 3, 8
SIZE = (torch.float32, "cpu")
CASES = {
    "attention": lambda: ops.attention_case(B, N, P, H, d, *SIZE),
    "attention without prompts": lambda: ops.attention_case(B, N, 0, H, d, *SIZE),
    "folded": lambda: ops.folded_case(B, N, P, H, H * d, *SIZE),
}


def counted(case: ops.Case, mode: str) -> int:
    (name,) = [n for n in case.ours if n.endswith("eager")]
    ((step, *_),) = ops.steps(case, mode, [name], "cpu").values()
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_operations_are_those_that_are_counted(make) -> None:
    case = make()
    forward = counted(case, ops.FORWARD)
    assert case.work.operations == forward
    assert case.work_backward.operations == counted(case, ops.BOTH) - forward


def test_bytes_are_each_input_and_output_once() -> None:
    inputs = ops.attention_case(B, N, P, H, d, *SIZE).draw()
    given = sum(x.nbytes for x in inputs.values())
    out, lse = inputs["q"].nbytes, 4 * B * H * N
    assert roofline.attention(B, N, P, H, d, itemsize=4).bytes == given + out + lse
    assert roofline.attention_backward(B, N, P, H, d, itemsize=4).bytes == 2 * given + 2 * out + lse

    blend = ops.blend_case(B, N, P, d, *SIZE).draw()
    read = sum(x.nbytes for name, x in blend.items() if name != "gate")
    assert roofline.gated_blend(B, N, P, d, itemsize=4).bytes == read + blend["x"].nbytes

    folded = ops.folded_case(B, N, P, H, d, *SIZE).draw()
    assert roofline.folded(B, N, P, H, d, itemsize=4).bytes == (
        sum(x.nbytes for x in folded.values()) + folded["x"].nbytes
    )
    normed = ops.folded_norm_case(B, N, P, H, d, *SIZE).draw()
    statistics = 2 * 4 * B * N
    assert roofline.folded_norm(B, N, P, H, d, itemsize=4).bytes == (
        sum(x.nbytes for x in normed.values()) + 2 * normed["x"].nbytes + statistics
    )


def test_columns_are_covered_with_the_least_that_the_pieces_allow() -> None:
    tiles = roofline.Tiles()
    expected = {1: 16, 50: 64, 150: 160, 197: 208, 207: 208, 209: 224, 241: 256, 256: 256, 257: 272, 297: 320}
    assert {n: tiles.padded_columns(n) for n in expected} == expected
    for n in range(1, 700):
        assert n <= tiles.padded_columns(n) < n + 48
    assert roofline.LOOPED.padded_columns(197) == 208
    assert roofline.Tiles(columns=128, resident=0).padded_columns(197) == 256
    assert [roofline.Tiles(rows=128).padded_rows(n) for n in (1, 128, 197)] == [128, 128, 256]


def test_the_floor_is_the_largest_of_the_three_times() -> None:
    chip = roofline.Chip("chip", bandwidth=1e6, products=1e6, exponentials=1e6)
    work = roofline.Work(bytes=3, operations=5, exponentials=4, executed=10)
    assert (work.floor_us(chip), work.bound(chip)) == (5.0, "products")
    assert work.with_padding().floor_us(chip) == 10.0
    assert roofline.Work(bytes=7, operations=5).bound(chip) == "bytes"


def test_no_tile_computes_less_than_is_needed() -> None:
    for vit in roofline.MODELS:
        for prompts in roofline.PROMPTS:
            size = (128, vit.N, prompts, vit.H, vit.D // vit.H)
            for work in (roofline.attention(*size), roofline.attention_backward(*size)):
                assert work.executed >= work.operations > 0
                assert work.with_padding().floor_us() >= work.floor_us()


def test_floors_of_the_kernel_that_a_class_token_needs_do_not_count_projected_rows() -> None:
    rows: Tensor = torch.empty(128, 197, 768, dtype=torch.bfloat16)
    work = roofline.row_attention(128, 197, 0, 12, 768)
    assert rows.nbytes < work.bytes < 1.1 * rows.nbytes

"""The model of bytes and operations counts what the operations count themselves, and tiles cover what they should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import cases, ops, roofline
from bench.cases import (
    folded_cross_attention,
    gated_blend,
    prompt_attention,
    residual_norm,
    row_attention,
)

B, N, P, H, d = 2, 13, 5, 3, 8
SIZE = (torch.float32, "cpu")
CASES = {
    "attention": lambda: prompt_attention.case(B, N, P, H, d, *SIZE),
    "attention without prompts": lambda: prompt_attention.case(B, N, 0, H, d, *SIZE),
    "folded": lambda: folded_cross_attention.case(B, N, P, H, H * d, *SIZE),
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
    forward, backward = case.work
    assert forward.operations == counted(case, ops.FORWARD)
    assert backward.operations == counted(case, ops.BOTH) - forward.operations


def test_bytes_are_each_input_and_output_once() -> None:
    case = prompt_attention.case(B, N, P, H, d, *SIZE)
    inputs = case.draw()
    given = sum(x.nbytes for x in inputs.values())
    out, lse = inputs["q"].nbytes, 4 * B * H * N
    assert [work.bytes for work in case.work] == [given + out + lse, 2 * given + out + lse]

    statistics = 2 * 4 * B * N
    for autocast in (False, True):
        case = residual_norm.case(B, N, d, torch.bfloat16, "cpu", autocast=autocast)
        inputs = case.draw()
        read = sum(x.nbytes for x in inputs.values())
        written = inputs["x"].nbytes + inputs["delta"].nbytes
        assert case.work[0].bytes == read + written + statistics
        # Both gradients, y and the weight; d(x), and d(delta) if it is another tensor.
        read = 2 * inputs["x"].nbytes + inputs["delta"].nbytes + inputs["weight"].nbytes
        assert case.work[1].bytes == read + (written if autocast else inputs["x"].nbytes) + statistics

    for norm in (False, True):
        case = gated_blend.case(B, N, P, d, *SIZE, norm=norm)
        inputs = case.draw()
        read = sum(x.nbytes for name, x in inputs.items() if name != "gate")
        assert case.work[0].bytes == read + (1 + norm) * inputs["x"].nbytes + norm * statistics

        case = folded_cross_attention.case(B, N, P, H, H * d, *SIZE, norm=norm)
        inputs = case.draw()
        read = sum(x.nbytes for x in inputs.values())
        assert case.work[0].bytes == read + (1 + norm) * inputs["x"].nbytes + norm * statistics


def test_what_tiles_execute_is_counted_with_their_padding() -> None:
    """197 queries fill 256 rows, and in the backward 224; 207 keys fill 208 columns, and in the backward 256."""
    executed = [work.executed for work in prompt_attention.work(1, 197, 10, 1, 64)]
    assert executed == [4 * 64 * 256 * 208, 10 * 64 * 224 * 256]


def test_the_floor_is_the_largest_of_the_three_times() -> None:
    chip = roofline.Chip("chip", bandwidth=1e6, products=1e6, exponentials=1e6)
    work = roofline.Work(bytes=3, operations=5, exponentials=4, executed=10)
    assert (work.floor_us(chip), work.bound(chip)) == (5.0, "products")
    assert work.with_padding().floor_us(chip) == 10.0
    assert roofline.Work(bytes=7, operations=5).bound(chip) == "bytes"


@pytest.mark.parametrize("name", cases.NAMES)
def test_no_tile_computes_less_than_is_needed(name: str) -> None:
    for vit in roofline.MODELS:
        for prompts in roofline.PROMPTS:
            for work in cases.load(name).floors(128, vit, prompts):
                assert work.floor_us() > 0
                if work.executed:
                    assert work.executed >= work.operations > 0
                    assert work.with_padding().floor_us() >= work.floor_us()


def test_row_attention_reads_little_but_its_rows() -> None:
    rows: Tensor = torch.empty(128, 197, 768, dtype=torch.bfloat16)
    forward, _ = row_attention.work(128, 197, 0, 12, 768)
    assert rows.nbytes < forward.bytes < 1.1 * rows.nbytes

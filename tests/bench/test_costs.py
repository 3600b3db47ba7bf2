"""The committed table of counted operations and bytes: nothing in it may change unnoticed."""

from __future__ import annotations

import pytest

from bench import costs
from bench.costs import SETTINGS, Row, Setting

TABLE = costs.read()
SMALL, BASE, _ = costs.MODELS
# Each method at two sizes and two numbers of prompts, in seconds; `make test-all` counts every row.
QUICK = [
    s
    for s in SETTINGS
    if (s.model, s.P) in ((SMALL, 10), (BASE, 50)) and (s.recompute is None or s.method == "vpt-deep")
]


def check(setting: Setting) -> None:
    changed = list(costs.changes(TABLE, [setting]))
    assert not changed, "\n".join([*changed, costs.ADVICE])


@pytest.mark.parametrize("setting", QUICK, ids=str)
def test_costs_are_those_of_the_table(setting: Setting) -> None:
    check(setting)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [s for s in SETTINGS if s not in QUICK], ids=str)
def test_costs_of_every_other_row_are_those_of_the_table(setting: Setting) -> None:
    check(setting)


def test_the_table_has_every_setting_and_a_readable_form() -> None:
    assert list(TABLE) == SETTINGS
    assert costs.TABLE.with_suffix(".md").read_text() == costs.readable(TABLE)


@pytest.mark.parametrize(("factor", "kind"), [(0.999, "grew"), (1.001, "shrank")])
@pytest.mark.parametrize("side", Row._fields)
@pytest.mark.parametrize("name", costs.Cost._fields)
def test_a_change_of_one_number_is_reported(
    side: str, name: str, factor: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, row = next(iter(TABLE.items()))
    monkeypatch.setattr(costs, "count", lambda setting: row)
    cost = getattr(row, side)
    before = row._replace(**{side: cost._replace(**{name: int(factor * getattr(cost, name))})})
    (found,) = costs.changes({setting: before}, [setting])
    assert found.startswith(f"vpt-deep on {SMALL}, P=10: {side}.{name} {kind} from ")


def test_forward_operations_of_vpt_deep_are_those_of_the_formulas() -> None:
    """The formulas of docs/shortcuts.md, for ViT-B with 50 prompts."""
    ours, papers = TABLE[Setting(BASE, "vpt-deep", 50)]
    B, P, N, D, H, L, classes = costs.BATCH, 50, 197, 768, 12, 12, costs.CLASSES
    ends = 2 * B * 196 * (3 * 16 * 16) * D + 2 * B * D * classes
    block = B * (24 * N * D**2 + 4 * N * (N + P) * D) + 4 * P * D**2
    last = B * (24 * D**2 + 4 * H * (N + P) * D)
    assert ours.forward == ends + (L - 1) * block + last
    rows = N + P
    assert papers.forward == ends + L * B * (24 * rows * D**2 + 4 * rows**2 * D)


def test_recomputing_the_hidden_layer_keeps_what_was_aimed_at() -> None:
    """VPT-Deep on ViT-B: bytes kept, as a ratio to the papers' form, for at most 1.2 times the operations."""
    for P, ratio in zip(costs.PROMPTS, (0.53, 0.46, 0.39), strict=True):
        setting = Setting(BASE, "vpt-deep", P)
        ours, papers = TABLE[setting._replace(recompute="mlp")]
        assert ours.saved_bytes <= ratio * papers.saved_bytes
        assert ours.training <= 1.2 * TABLE[setting].ours.training


def test_recomputed_operations_are_those_of_the_formulas() -> None:
    """ViT-B, P=50: one product more for "mlp"; "attention" makes queries, keys, values and attention again."""
    B, P, N, D, H, L = costs.BATCH, 50, 197, 768, 12, 12
    nothing = TABLE[Setting(BASE, "vpt-deep", P)].ours
    mlp, attention = (
        TABLE[Setting(BASE, "vpt-deep", P, part)].ours.training - nothing.training
        for part in ("mlp", "attention")
    )
    assert mlp == B * 8 * D**2 * ((L - 1) * N + 1)
    rows = B * (L - 1) * (6 * N * D**2 + 4 * N * (N + P) * D)
    last = B * (6 * D**2 + 4 * H * (N + P) * D)  # of the class token: query, its fold, attention and context
    assert attention == rows + last

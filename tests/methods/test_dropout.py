"""Prompt dropout of every method against the papers' form (bench/papers.py).

Each image draws its own mask, after the prompts are expanded to the batch. Both sides draw from the same seed, block by
block, so the masks are the same.
"""

from __future__ import annotations

import pytest
import torch
from prompted_models import FAMILIES, LABELS, METHODS, changed, outputs_and_gradients, prompted
from timm_families import images

from bench.correctness import assert_same
from bench.papers import paper_model
from fastprompt import CVPTConfig, PromptConfig, VPTConfig

CASES: dict[str, PromptConfig] = {
    **{name: changed(config, dropout=0.4) for name, config in METHODS.items()},
    "vpt-partial": VPTConfig(3, blocks=2, dropout=0.4),
    "da-vpt-normed": changed(METHODS["da-vpt"], dropout=0.4, prompt_norm="l2"),
    **{f"cvpt-insert{i}": CVPTConfig(3, insert=i, dropout=0.4) for i in (1, 2, 4, 5)},
}
BATCH = len(LABELS)


@pytest.mark.parametrize("shortcuts", [True, False], ids=["shortcuts", "full"])
@pytest.mark.parametrize("case", CASES)
def test_dropout_of_each_image_equals_the_papers_form(case: str, shortcuts: bool) -> None:
    model = prompted("vit", CASES[case], shortcuts=shortcuts, depth=3).train()
    torch.manual_seed(3)
    mine = outputs_and_gradients(model, images(BATCH))
    torch.manual_seed(3)
    theirs = outputs_and_gradients(paper_model(model), images(BATCH))
    assert all(g.any() for name, g in theirs.items() if name.startswith("prompts"))
    assert_same(mine, theirs)


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_dropped_keys_and_values_are_right_on_other_families(family: str) -> None:
    model = prompted(family, CASES["vpt-deep"]).train()
    torch.manual_seed(3)
    mine = outputs_and_gradients(model, images(BATCH), None)
    torch.manual_seed(3)
    assert_same(mine, outputs_and_gradients(paper_model(model), images(BATCH), None))


@pytest.mark.parametrize("case", CASES)
def test_images_of_one_batch_draw_different_masks_in_training_alone(case: str) -> None:
    model = prompted("vit", CASES[case], depth=3).train()
    x = images(1).expand(BATCH, -1, -1, -1)
    with torch.no_grad():
        logits = model(x)
        assert len({tuple(row.tolist()) for row in logits}) == BATCH
        folded = model.fold()
        logits = model.eval()(x)
        assert torch.equal(model(x), logits)
        assert_same(folded(x), logits)

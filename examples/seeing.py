"""Draw the figures of docs/seeing.md with `fastprompt.viz`, from scratch and without a download.

A small ViT learns scikit-learn's handwritten digits 0 to 4 and is frozen. Prompts of three methods then learn the
digits 5 to 9, each for a few seconds.

    python -m examples.seeing --out docs/images
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastprompt
from examples.digits.backbone import train_backbone
from examples.digits.data import augment, digits
from examples.digits.protocol import Backbone
from fastprompt import viz
from fastprompt.training import Batches, LabelledImages, evaluate, fit, split_per_class

NEW = range(5, 10)
METHODS: dict[str, fastprompt.PromptConfig] = {
    "VPT-Deep": fastprompt.VPTConfig(8),
    "GateVPT": fastprompt.GateVPTConfig(8, gate_init=2.0),
    "DA-VPT": fastprompt.DAVPTConfig(8, 3, (2, 3), class_feature="cls", class_weight=0.5),
}


def trained(epochs: int, tuning_epochs: int) -> tuple[dict[str, Any], LabelledImages]:
    """Return a trained model of each method, and held-out images of the digits 5 to 9."""
    held_out, train = split_per_class(digits(range(5)), 90, seed=0)
    setting = Backbone(depth=4, epochs=epochs)
    backbone, _, accuracy = train_backbone(setting, train, held_out, seed=0, device=torch.device("cpu"))
    print(f"backbone: {accuracy:.0%} of the digits 0 to 4 right")
    train, test = split_per_class(digits(NEW), 400, seed=0)
    models: dict[str, Any] = {}
    for name, config in METHODS.items():
        own = copy.deepcopy(backbone)
        torch.manual_seed(0)  # for the new head and the prompts
        own.reset_classifier(len(NEW))
        models[name] = model = fastprompt.get_prompt_model(own, config)
        batches = Batches(train, 20, seed=0, transform=augment)
        if name == "DA-VPT":
            model.fit_class_map(batches)
        fit(model, batches, epochs=tuning_epochs, lr=0.05)
        print(f"{name}: {evaluate(model, Batches(test, 256)):.0%} of the digits 5 to 9 right")
    return models, test


def figures(models: dict[str, Any], test: LabelledImages) -> dict[str, Any]:
    """Return the figures by file name."""
    deep, gated, guided = models["VPT-Deep"], models["GateVPT"], models["DA-VPT"]
    loader = Batches(test, 100)
    some = torch.cat([test.images[test.labels == label][:1] for label in range(3)])
    last = len(deep.base.blocks) - 1
    return {
        "seeing-attention": viz.plot_attention(deep, some, block=last - 1),
        "seeing-gates": viz.plot_gates(gated),
        "seeing-class-map": viz.plot_class_map(guided, loader, block=last),
        "seeing-similarity": viz.plot_prompt_similarity(deep, block=last),
        "seeing-tsne": viz.plot_tsne(guided, loader, block=last),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw what prompts do, on scikit-learn's digits.")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder of the figures")
    parser.add_argument("--epochs", type=int, default=90, help="of the backbone")
    parser.add_argument("--tuning-epochs", type=int, default=18, help="of each method's prompts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the matrices are too small for two
    options.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(*trained(options.epochs, options.tuning_epochs)).items():
        path = options.out / f"{name}.png"
        figure.savefig(path, dpi=90)
        print(path)


if __name__ == "__main__":
    main()

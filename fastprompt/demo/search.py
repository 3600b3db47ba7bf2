"""The search behind `protocol.METHODS`: `python -m fastprompt.demo.search` prints validation accuracies.

It sees no image of the test set: it tunes on each draw's labelled images and validates on what the draw left in the
pool.
"""

import argparse
import json
from dataclasses import replace
from typing import Any

from fastprompt.demo.protocol import METHODS, Method, Protocol
from fastprompt.demo.run import Prepared, one_thread, prepare, prompted, tune
from fastprompt.training import Batches, evaluate, split_per_class

LEARNING_RATES = (0.02, 0.05, 0.1, 0.2)


def validate(prepared: Prepared, method: Method, protocol: Protocol) -> list[float]:
    """Validation accuracy of each draw, 0..1."""
    accuracies = []
    for seed in range(protocol.seeds):
        train, validation = split_per_class(prepared.pool, protocol.labelled, seed=seed)
        model = prompted(prepared.backbone, method, len(train.classes), seed=seed)
        tune(model, train, method, protocol, seed=seed)
        accuracies.append(evaluate(model, Batches(validation, 256)))
    return accuracies


def main() -> None:
    """Print one line per method and learning rate."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--lr", nargs="+", type=float, default=list(LEARNING_RATES))
    parser.add_argument("--seeds", type=int, default=Protocol().seeds)
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="other values of the methods' configurations, in JSON",
    )
    args = parser.parse_args()
    protocol = Protocol(seeds=args.seeds)
    fields = {field: json.loads(value) for field, _, value in (item.partition("=") for item in args.set)}
    with one_thread():
        _search(protocol, args.methods, args.lr, fields)


def _search(protocol: Protocol, methods: list[str], rates: list[float], fields: dict[str, Any]) -> None:
    prepared = prepare(protocol)
    print(f"backbone: {100 * prepared.backbone_accuracy:.1f} %", flush=True)
    for name in methods:
        config = replace(METHODS[name].config, **fields)
        for lr in rates:
            accuracies = validate(prepared, replace(METHODS[name], config=config, lr=lr), protocol)
            mean = sum(accuracies) / len(accuracies)
            each = " ".join(f"{100 * a:.0f}" for a in accuracies)
            print(f"{name:<12} lr={lr:<6} {100 * mean:.1f} %  ({each})", flush=True)


if __name__ == "__main__":
    main()

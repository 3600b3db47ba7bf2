"""The search for the learning rates in `protocol.METHODS`: `python -m examples.digits.search`.

Each draw tunes on its labelled images and validates on the rest of the pool; the test set is not used.
"""

import argparse
from dataclasses import replace

from examples.digits.protocol import METHODS, Protocol
from examples.digits.run import one_thread, prepare, prompted, tune
from fastprompt.training import Batches, evaluate, split_per_class


def main() -> None:
    """Print the validation accuracies of each method at each learning rate."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--lr", nargs="+", type=float, default=[0.02, 0.05, 0.1, 0.2])
    options = parser.parse_args()
    protocol = Protocol()
    prepared = prepare(protocol, lambda stage, done, total: None)
    for name in options.methods:
        for lr in options.lr:
            method, accuracies = replace(METHODS[name], lr=lr), []
            for seed in range(protocol.seeds):
                train, validation = split_per_class(prepared.pool, protocol.labelled, seed=seed)
                model = prompted(prepared.backbone, method, len(train.classes), seed=seed)
                tune(model, train, method, protocol, seed=seed)
                accuracies.append(100 * evaluate(model, Batches(validation, 256)))
            mean, each = sum(accuracies) / len(accuracies), " ".join(f"{a:.0f}" for a in accuracies)
            print(f"{name:<12} lr={lr:<6} {mean:.1f} %  ({each})", flush=True)


if __name__ == "__main__":
    with one_thread():
        main()

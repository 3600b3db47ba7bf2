"""The linear probe: multinomial logistic regression on the frozen features, run to convergence."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastprompt.training import LabelledImages, augment

# From far too strong a penalty to practically none.
INVERSE_PENALTIES = tuple(10.0 ** (e / 2) for e in range(-4, 8))
FOLDS = 5
COPIES = 5


@dataclass(frozen=True)
class Probe:
    """The fitted probe: weight [classes, D], bias [classes], and what cross-validation chose."""

    weight: Tensor
    bias: Tensor
    strength: float
    distorted: bool

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Part of the images, given by features [B, D] and labels [B], that it gets right, 0..1."""
        guess = (features @ self.weight.T + self.bias).argmax(-1)
        return float((guess == labels).double().mean())


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """What the head of a timm model reads: images [B, C, height, width] -> [B, D], on the CPU."""
    device = next(model.parameters()).device
    read = [
        model.forward_head(model.forward_features(part.to(device)), pre_logits=True).cpu()  # type: ignore[operator]
        for part in images.split(256)
    ]
    return torch.cat(read)


def probe(model: nn.Module, train: LabelledImages, *, seed: int) -> Probe:
    """Fit the probe on `train`, with the best settings that cross-validation on these images finds.

    It chooses the L2 penalty, and whether distorted copies of the images (as prompts are tuned on) help.
    """
    plain = features(model, train.images).unsqueeze(1)
    generator = torch.Generator().manual_seed(seed)
    copies = [features(model, augment(train.images, generator)) for _ in range(COPIES)]
    return fit_probe(plain, torch.stack([plain[:, 0], *copies], 1), train.labels, seed=seed)


def fit_probe(plain: Tensor, distorted: Tensor, labels: Tensor, *, seed: int) -> Probe:
    """As `probe`, on features: of the images [B, 1, D], and of all copies of each [B, copies, D]; labels [B]."""
    folds = _folds(labels, seed)
    found = []
    for with_copies, x in ((False, plain), (True, distorted)):
        for strength in INVERSE_PENALTIES:
            right = 0.0
            for fold in folds:
                weight, bias = _logistic_regression(x[~fold], labels[~fold], strength)
                right += float(((plain[fold, 0] @ weight.T + bias).argmax(-1) == labels[fold]).sum())
            found.append((right, with_copies, strength))
    _, with_copies, strength = max(found, key=lambda f: f[0])
    weight, bias = _logistic_regression(distorted if with_copies else plain, labels, strength)
    return Probe(weight, bias, strength, with_copies)


def _folds(labels: Tensor, seed: int) -> list[Tensor]:
    """Masks [B] of the images each fold holds out, every class spread over all folds."""
    generator = torch.Generator().manual_seed(seed)
    fold_of = torch.empty_like(labels)
    for label in labels.unique():
        rows = (labels == label).nonzero().squeeze(1)
        fold_of[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)) % FOLDS
    return [fold_of == fold for fold in range(FOLDS)]


def _logistic_regression(x: Tensor, labels: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Features [B, copies, D] and labels [B] -> weight [classes, D], bias [classes]; an image counts once."""
    from sklearn.linear_model import LogisticRegression

    copies = x.shape[1]
    rows, targets = x.flatten(0, 1).double().numpy(), labels.repeat_interleave(copies).numpy()
    # C weighs the sum over rows against the penalty; divided, so that copies do not weaken the penalty.
    model = LogisticRegression(C=strength / copies, solver="newton-cg", max_iter=1000).fit(rows, targets)
    weight = torch.tensor(model.coef_, dtype=torch.float32)
    bias = torch.tensor(model.intercept_, dtype=torch.float32)
    if len(weight) == 1:  # two classes come as one row, the second against the first
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight, bias

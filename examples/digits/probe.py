"""The linear probe: multinomial logistic regression on the frozen features, fitted to convergence."""

from dataclasses import dataclass

import torch
from sklearn.linear_model import LogisticRegression
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from examples.digits.data import augment
from fastprompt.training import LabelledImages

# From far too strong a penalty to almost none.
INVERSE_PENALTIES = tuple(10.0 ** (e / 2) for e in range(-4, 8))
FOLDS = 5
COPIES = 5


@dataclass(frozen=True)
class Probe:
    """The fitted probe: weight [classes, D], bias [classes], and the settings that cross-validation chose."""

    weight: Tensor
    bias: Tensor
    strength: float
    distorted: bool

    def correct(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return a mask [B] of the images that it classifies correctly, given features [B, D] and labels [B]."""
        return (features @ self.weight.T + self.bias).argmax(-1) == labels

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Return the accuracy on features [B, D] with labels [B], 0 to 1."""
        return float(self.correct(features, labels).double().mean())


@torch.no_grad()
def features(model: VisionTransformer, images: Tensor) -> Tensor:
    """Return the input of the model's head for images [B, C, height, width]: [B, D], on the CPU."""
    device = next(model.parameters()).device
    parts = [model.forward_features(part.to(device)) for part in images.split(256)]
    return torch.cat([model.forward_head(part, pre_logits=True).cpu() for part in parts])


def probe(model: VisionTransformer, train: LabelledImages, *, seed: int) -> Probe:
    """Fit the probe on `train` with the settings that are best in cross-validation on these images.

    The settings are the L2 penalty and whether to add augmented copies of the images.
    """
    plain = features(model, train.images).unsqueeze(1)
    generator = torch.Generator().manual_seed(seed)
    copies = [features(model, augment(train.images, generator)) for _ in range(COPIES)]
    return fit_probe(plain, torch.stack([plain[:, 0], *copies], 1), train.labels, seed=seed)


def fit_probe(plain: Tensor, distorted: Tensor, labels: Tensor, *, seed: int) -> Probe:
    """As `probe`, on features: [B, 1, D] of the images, [B, copies, D] of all their copies; labels [B]."""
    folds = _folds(labels, seed)
    found = []
    for with_copies, x in ((False, plain), (True, distorted)):
        for strength in INVERSE_PENALTIES:
            right = 0
            for fold in folds:
                fitted = _logistic_regression(x[~fold], labels[~fold], strength, with_copies)
                right += int(fitted.correct(plain[fold, 0], labels[fold]).sum())
            found.append((right, with_copies, strength))
    _, with_copies, strength = max(found, key=lambda f: f[0])
    return _logistic_regression(distorted if with_copies else plain, labels, strength, with_copies)


def _folds(labels: Tensor, seed: int) -> list[Tensor]:
    """Return a mask [B] of the held-out images of each fold, with every class in all folds."""
    generator = torch.Generator().manual_seed(seed)
    fold_of = torch.empty_like(labels)
    for label in labels.unique():
        rows = (labels == label).nonzero().squeeze(1)
        fold_of[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)) % FOLDS
    return [fold_of == fold for fold in range(FOLDS)]


def _logistic_regression(x: Tensor, labels: Tensor, strength: float, distorted: bool) -> Probe:
    """Fit features [B, copies, D] to labels [B]; all copies of an image together count as one image."""
    copies = x.shape[1]
    rows, targets = x.flatten(0, 1).double().numpy(), labels.repeat_interleave(copies).numpy()
    # C weighs the sum over rows against the penalty.
    model = LogisticRegression(C=strength / copies, solver="newton-cg", max_iter=1000).fit(rows, targets)
    weight = torch.tensor(model.coef_, dtype=torch.float32)
    bias = torch.tensor(model.intercept_, dtype=torch.float32)
    return Probe(weight, bias, strength, distorted)

"""Data and a small loop for prompt tuning."""

from fastprompt.training.data import Batches, LabelledImages, augment, digits, split_per_class
from fastprompt.training.loop import History, TrainingStep, evaluate, fit
from fastprompt.training.sampler import ClassBalancedBatchSampler

__all__ = [
    "Batches",
    "ClassBalancedBatchSampler",
    "History",
    "LabelledImages",
    "TrainingStep",
    "augment",
    "digits",
    "evaluate",
    "fit",
    "split_per_class",
]

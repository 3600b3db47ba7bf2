"""A small training loop for prompts, with data in memory (docs/training.md)."""

from fastprompt.training.data import Batches, LabelledImages, split_per_class
from fastprompt.training.loop import History, TrainingStep, evaluate, fit
from fastprompt.training.sampler import ClassBalancedBatchSampler

__all__ = [
    "Batches",
    "ClassBalancedBatchSampler",
    "History",
    "LabelledImages",
    "TrainingStep",
    "evaluate",
    "fit",
    "split_per_class",
]

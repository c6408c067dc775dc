"""Classifiers that stop early: what there is beside :func:`adaptive.predict`.

A model that answers in stages is any of these:

- a Hugging Face classifier (BERT, ALBERT, RoBERTa, DistilBERT, ViT) with exits;
- a module with a method ``stages(batch)``, or a function of a batch, that yields the logits
  ``[rows, classes]`` (or a :class:`StageOutput`) of one stage after another;
- a list of models from small to large: a cascade.

A generator is told which rows go on, so that it need not compute the others:
``keep = yield logits`` gives their places, or ``None`` for all of them.
"""

from __future__ import annotations

from adaptive._classifier_exits import ClassifierExits
from adaptive._collect_classifier import collect_predictions
from adaptive._predict import Prediction, predict
from adaptive._stages import StageOutput
from adaptive._train_classifier import ClassifierTraining, train_classifier_exits

__all__ = [
    "ClassifierExits",
    "ClassifierTraining",
    "Prediction",
    "StageOutput",
    "collect_predictions",
    "predict",
    "train_classifier_exits",
]

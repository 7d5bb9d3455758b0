"""Measure sampled images against a reference and against their captions."""

from .evaluation import TextEvaluation, evaluate
from .text_scores import TextScorer

__all__ = ["TextEvaluation", "TextScorer", "evaluate"]

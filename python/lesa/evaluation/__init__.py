"""`lesa.evaluate` and what it returns."""

from lesa.contenders import TaylorSeer, taylorseer_grid  # older releases had them here
from lesa.evaluation.evaluator import evaluate
from lesa.evaluation.result import EvaluatedRun, Evaluation

__all__ = ["EvaluatedRun", "Evaluation", "TaylorSeer", "evaluate", "taylorseer_grid"]

"""How good a model's names are: held-out bits per character, control, novelty, and comparisons of models."""

from __future__ import annotations

from flash_experts.evaluation.compare import ComparisonResult, compare
from flash_experts.evaluation.evaluate import EvaluationResult, evaluate
from flash_experts.evaluation.name_lists import NamesResult, evaluate_names, read_names
from flash_experts.evaluation.plots import write_plots
from flash_experts.evaluation.report import write_report
from flash_experts.evaluation.tables import format_comparison, format_evaluation, format_names

__all__ = [
    "ComparisonResult",
    "EvaluationResult",
    "NamesResult",
    "compare",
    "evaluate",
    "evaluate_names",
    "format_comparison",
    "format_evaluation",
    "format_names",
    "read_names",
    "write_plots",
    "write_report",
]

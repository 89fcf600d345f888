"""How good a model's names are: held-out bits per character, control, novelty, and comparisons of models."""

from __future__ import annotations

from flash_experts.evaluation.compare import ComparisonResult, compare
from flash_experts.evaluation.evaluate import EvaluationResult, NamesResult, evaluate, evaluate_names, read_names
from flash_experts.evaluation.lists import ListMetrics, evaluate_lists
from flash_experts.evaluation.report import write_plots, write_report
from flash_experts.evaluation.tables import format_comparison, format_evaluation, format_lists, format_names

__all__ = [
    "ComparisonResult",
    "EvaluationResult",
    "ListMetrics",
    "NamesResult",
    "compare",
    "evaluate",
    "evaluate_lists",
    "evaluate_names",
    "format_comparison",
    "format_evaluation",
    "format_lists",
    "format_names",
    "read_names",
    "write_plots",
    "write_report",
]

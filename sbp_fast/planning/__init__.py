"""Plans: how much memory a step needs for every micro-batch size, and which size to take."""

from .choice import best_micro_batch_size
from .peak import Peak
from .peak_model import PeakModel
from .plan import BudgetError, Plan, PlanRow, plan, predict_peak, predict_peaks

__all__ = [
    "BudgetError",
    "Peak",
    "PeakModel",
    "Plan",
    "PlanRow",
    "best_micro_batch_size",
    "plan",
    "predict_peak",
    "predict_peaks",
]

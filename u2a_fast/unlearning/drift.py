"""The drift guard: unlearning ends before first-order scores go stale."""

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from u2a_fast.data.packing import Example
from u2a_fast.influence.derivatives import as_budget
from u2a_fast.unlearning.measure import mean_of_fitting

__all__ = ["DriftGuard"]


class DriftGuard(TrainerCallback):
    """Ends training before the mean NLL of some negatives has risen by more than ``max_drift`` nats.

    It looks after the first step and then every ``every`` steps; once it forecasts that the limit is crossed before the
    next look, it looks after each step, and ends training when the next step is forecast to cross. What it saw is in
    the state's log history, which checkpoints hold, so that a resumed run decides as an uninterrupted one.

    Args:
        model: the model at the start, from which the rise counts.
        examples: the negatives that are measured.
        reduction: ``"mean"`` or ``"sum"`` over an example's scored tokens.
        max_drift: limit of the rise, in nats.
        every: optimizer steps between two looks.
    """

    def __init__(
        self, model: nn.Module, examples: Sequence[Example], *, reduction: str, max_drift: float, every: int
    ) -> None:
        self.examples, self.reduction = list(examples), reduction
        self.max_drift, self.every = max_drift, every
        self._budget = as_budget(None, next(model.parameters()).device)  # what fits at the start fits later
        self.start = self._mean_nll(model)

    def _mean_nll(self, model: nn.Module) -> float:
        return mean_of_fitting(model, self.examples, reduction=self.reduction, token_budget=self._budget)

    def _looks(self, state: TrainerState) -> list[tuple[int, float]]:
        """Step and rise of every look so far, the start first."""
        return [(0, 0.0), *((int(row["step"]), row["drift"]) for row in state.log_history if "drift" in row)]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Look, if a look is due, and end training if the next step would cross the limit."""
        looks = self._looks(state)
        gap = 1 if len(looks) == 1 or _forecast(looks, self.every) > self.max_drift else self.every
        if state.global_step < looks[-1][0] + gap:
            return control
        drift = self._mean_nll(kwargs["model"]) - self.start
        if math.isnan(drift):
            raise FloatingPointError(f"[unlearn] the NLL of the negatives is NaN after step {state.global_step}")
        state.log_history.append({"step": state.global_step, "drift": drift})
        if _forecast(self._looks(state), 1) > self.max_drift:
            control.should_training_stop = True
            # a checkpoint of a run that has ended would take one step more when resumed
            control.should_save = False
        return control


def _forecast(looks: Sequence[tuple[int, float]], steps: int) -> float:
    """The rise ``steps`` after the last look, by the parabola through the last three looks, or the line through two.

    It never forecasts a fall or a slowing down.
    """
    (step_1, rise_1), (step_2, rise_2) = looks[-2:]
    slope, growth = (rise_2 - rise_1) / (step_2 - step_1), 0.0
    if len(looks) > 2:
        step_0, rise_0 = looks[-3]
        growth = (slope - (rise_1 - rise_0) / (step_1 - step_0)) / (step_2 - step_0)
    return rise_2 + steps * max(slope + max(growth, 0.0) * (step_2 - step_1 + steps), 0.0)

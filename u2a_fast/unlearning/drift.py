"""The drift guard: unlearning ends before first-order scores go stale."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from u2a_fast.data.packing import Example
from u2a_fast.unlearning.measure import nlls

__all__ = ["DriftGuard"]


class DriftGuard(TrainerCallback):
    """Ends training before the mean NLL of some negatives has risen by more than ``max_drift`` nats.

    It looks after the first step and then every ``every`` steps; once a straight line through the last two looks
    crosses the limit before the next look, it looks after each step, and ends training when the next step would cross
    it. What it saw is in the state's log history, which checkpoints hold, so that a resumed run decides as an
    uninterrupted one.

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
        self.start = self._mean_nll(model)

    def _mean_nll(self, model: nn.Module) -> float:
        return nlls(model, self.examples, reduction=self.reduction).mean().item()

    def _line(self, state: TrainerState) -> tuple[int, float, float]:
        """Step and rise of the last look, and the rise a step between the last two."""
        looks = [(0, 0.0), *((row["step"], row["drift"]) for row in state.log_history if "drift" in row)]
        if len(looks) == 1:
            return 0, 0.0, float("inf")
        (step_0, rise_0), (step_1, rise_1) = looks[-2:]
        return int(step_1), rise_1, (rise_1 - rise_0) / (step_1 - step_0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Look, if a look is due, and end training if the next step would cross the limit."""
        step, rise, slope = self._line(state)
        gap = 1 if rise + slope * self.every > self.max_drift else self.every
        if state.global_step < step + gap:
            return control
        drift = self._mean_nll(kwargs["model"]) - self.start
        if drift != drift:
            raise FloatingPointError(f"[unlearn] the NLL of the negatives is NaN after step {state.global_step}")
        state.log_history.append({"step": state.global_step, "drift": drift})
        _, rise, slope = self._line(state)
        if rise + max(slope, 0.0) > self.max_drift:
            control.should_training_stop = True
            # a checkpoint of a run that has ended would take one step more when resumed
            control.should_save = False
        return control

"""Preference objectives L_PA(theta): what unlearning should lower.

Every objective here is a mean over rows of a function of the log-probabilities of a few sequences. So its value needs
log-probabilities alone, and its gradient is one weighted sum of their gradients: first c_s = dL/d logp_s, then the
gradient of sum_s c_s logp_s over batches of any composition.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from u2a_fast.data.packing import Example, batched
from u2a_fast.influence.derivatives import as_budget
from u2a_fast.models.decoder import Decoder, check_reduction, reduce_tokens
from u2a_fast.models.memory import Room, TokenBudget, describe
from u2a_fast.models.parameters import evaluation_mode

__all__ = ["DPO", "Objective", "Reward", "SFT"]


class Objective(ABC):
    """A mean over rows of a loss of the log-probabilities of each row's sequences; lower is better.

    Attributes:
        rows: the rows that it was built from.
        reduction: how token log-probabilities make a sequence's, ``"sum"`` or ``"mean"``.
        reference: log-probabilities (rows, sequences a row) at the model that ``prepare`` saw, None before that.
    """

    needs_reference = False

    def __init__(self, rows: Iterable[Mapping[str, Any]], *, reduction: str) -> None:
        check_reduction(reduction)
        self.rows = list(rows)
        self.reduction = reduction
        self.reference: Tensor | None = None
        if not self.rows:
            raise ValueError(f"[{type(self).__name__}] expected at least one row, got none")

    @abstractmethod
    def sequences(self) -> list[Example]:
        """Token examples, row by row; each row has the same number of them."""

    @abstractmethod
    def row_losses(self, logprobs: Tensor) -> Tensor:
        """Loss of every row (R) from the log-probabilities of its sequences (R, S); their mean is L_PA."""

    @abstractmethod
    def _with_rows(self, index: Sequence[int]) -> Self:
        """The same objective on some of its rows, before ``prepare``."""

    def subset(self, index: Sequence[int]) -> Self:
        """The same objective, reference included, on the rows at ``index``."""
        part = self._with_rows(index)
        if self.reference is not None:
            part.reference = self.reference[list(index)]
        return part

    def split(self, fraction: float, seed: int = 0) -> tuple[Self, Self]:
        """Two disjoint random parts, the second with ``fraction`` of the rows (at least one, at most all but one)."""
        if not 0 < fraction < 1 or len(self.rows) < 2:
            raise ValueError(
                f"[{type(self).__name__}.split] expected 0 < fraction < 1 and at least 2 rows, "
                f"got {fraction} and {len(self.rows)}"
            )
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed)).tolist()
        cut = min(max(round(fraction * len(order)), 1), len(order) - 1)
        return self.subset(sorted(order[cut:])), self.subset(sorted(order[:cut]))

    def prepare(self, model: nn.Module, *, token_budget: int | TokenBudget | None = None) -> Self:
        """Fix the reference log-probabilities at ``model`` as it is now; a second call changes nothing."""
        if self.needs_reference and self.reference is None:
            self.reference = self.logprobs(model, token_budget=token_budget).cpu()
        return self

    def logprobs(self, model: nn.Module, *, token_budget: int | TokenBudget | None = None) -> Tensor:
        """Log-probabilities (R, S) of every row's sequences, nothing differentiable, in nats.

        Raises torch.OutOfMemoryError, naming it, for a sequence that does not fit in memory even alone.
        """
        return self._logprobs(model, token_budget, nan_where_unfit=False)

    def logprobs_that_fit(self, model: nn.Module, *, token_budget: int | TokenBudget | None = None) -> Tensor:
        """``logprobs``, NaN with a warning for a sequence that does not fit in memory even alone."""
        return self._logprobs(model, token_budget, nan_where_unfit=True)

    def _logprobs(self, model: nn.Module, token_budget: int | TokenBudget | None, *, nan_where_unfit: bool) -> Tensor:
        decoder = Decoder(model)
        examples = self.sequences()

        def attempt(room: Room) -> list[Tensor]:
            out: list[Tensor | None] = [None] * len(examples)
            plan = batched(examples, room.tokens)
            for positions, values in room.each(plan, lambda _, batch: self._of_batch(decoder, batch)):
                if values is None and not nan_where_unfit:
                    raise self._unfit(positions[0], examples)
                for position, value in zip(positions, [None] if values is None else values, strict=True):
                    out[position] = value
            known = next((value for value in out if value is not None), torch.empty((), device=decoder.device))
            return [torch.full_like(known, torch.nan) if value is None else value for value in out]

        with evaluation_mode(model), torch.no_grad():
            found = as_budget(token_budget, decoder.device).fit("log-probabilities", attempt)
        return torch.stack(found).view(len(self.rows), -1)

    def _of_batch(self, decoder: Decoder, batch: Sequence[Example]) -> Tensor:
        """Log-probabilities (B) of a batch's sequences."""
        packed = decoder.pack(batch)
        return reduce_tokens(decoder.token_logprobs(packed)[None], packed, self.reduction)[0]

    def _unfit(self, position: int, examples: Sequence[Example]) -> torch.OutOfMemoryError:
        """What ends a run: without one of its sequences the objective would be another."""
        row, own = divmod(position, len(examples) // len(self.rows))
        return torch.OutOfMemoryError(
            f"[{type(self).__name__}] sequence {own} of preference row {row} "
            f"({describe(position, examples[position])}) "
            "does not fit in memory even alone: cut rows shorter (max_length), leave that row out, load the model in "
            "bfloat16, or select fewer parameters (their gradients take memory too)"
        )

    def losses(self, model: nn.Module, *, token_budget: int | TokenBudget | None = None) -> Tensor:
        """Loss of every row (R) at ``model``."""
        return self.row_losses(self.logprobs(model, token_budget=token_budget))

    def value(self, model: nn.Module, *, token_budget: int | TokenBudget | None = None) -> float:
        """L_PA at ``model``, in nats (Reward: reward-weighted nats); lower is better."""
        return self.losses(model, token_budget=token_budget).mean().item()

    def coefficients(self, logprobs: Tensor) -> Tensor:
        """d row_loss / d logp (R, S) for every row alone; L_PA's own are these over R."""
        leaf = logprobs.detach().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(self.row_losses(leaf).sum(), leaf)
        return grad

    def gradient(
        self,
        model: nn.Module,
        names: Iterable[str] | None = None,
        *,
        token_budget: int | TokenBudget | None = None,
    ) -> dict[str, Tensor]:
        """Gradient of L_PA by parameter name, at ``model`` in evaluation mode.

        Args:
            model: a transformers causal LM or a PEFT model around one.
            names: names of ``model.named_parameters()``; None: those with ``requires_grad``.
            token_budget: most tokens a batch, halved with a warning where that does not fit in memory.

        Returns:
            name -> tensor of the parameter's shape, float32 (float64 for float64 parameters).

        Raises:
            ValueError: a name is not one of the model's parameters.
            torch.OutOfMemoryError: a sequence, named, does not fit in memory even alone.
        """
        parameters = dict(model.named_parameters())
        chosen = [n for n, p in parameters.items() if p.requires_grad] if names is None else list(names)
        if unknown := [name for name in chosen if name not in parameters]:
            raise ValueError(f"[gradient] expected names of model.named_parameters(), got {unknown[:3]}")
        trainable = [parameters[name] for name in chosen]
        decoder, examples = Decoder(model), self.sequences()
        budget = as_budget(token_budget, decoder.device)
        weights = self.coefficients(self.logprobs(model, token_budget=budget)).flatten() / len(self.rows)

        def of_batch(positions: list[int], batch: Sequence[Example]) -> Sequence[Tensor | None]:
            values = self._of_batch(decoder, batch)
            return torch.autograd.grad(values @ weights[positions].to(values.dtype), trainable, allow_unused=True)

        def attempt(room: Room) -> list[Tensor]:
            total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trainable]
            for positions, grads in room.each(batched(examples, room.tokens), of_batch):
                if grads is None:
                    raise self._unfit(positions[0], examples)
                for sum_, grad in zip(total, grads, strict=True):
                    if grad is not None:
                        sum_ += grad
            return total

        with evaluation_mode(model, trainable):
            return dict(zip(chosen, budget.fit("gradient", attempt), strict=True))


class DPO(Objective):
    """-log sigmoid(beta [(logp(chosen) - logp_ref(chosen)) - (logp(rejected) - logp_ref(rejected))]), mean over pairs.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. The reference is the model that ``prepare`` saw.

    Args:
        rows: mappings with token examples ``chosen`` and ``rejected``.
        beta: inverse temperature, 1/nats.
        reduction: ``"sum"`` (DPO as published) or ``"mean"`` over a response's tokens.
    """

    needs_reference = True

    def __init__(self, rows: Iterable[Mapping[str, Any]], *, beta: float = 0.1, reduction: str = "sum") -> None:
        super().__init__(rows, reduction=reduction)
        if not beta > 0:
            raise ValueError(f"[DPO] expected beta > 0, got {beta}")
        self.beta = beta

    def sequences(self) -> list[Example]:
        return [row[key] for row in self.rows for key in ("chosen", "rejected")]

    def _with_rows(self, index: Sequence[int]) -> Self:
        return type(self)([self.rows[i] for i in index], beta=self.beta, reduction=self.reduction)

    def margins(self, logprobs: Tensor) -> Tensor:
        """Implicit reward of chosen minus rejected, (R), in units of beta nats."""
        if self.reference is None:
            raise RuntimeError(
                "[DPO] expected prepare(model) before use: the reference log-probabilities are not known"
            )
        return self.beta * ((logprobs - self.reference.to(logprobs)) @ logprobs.new_tensor([1.0, -1.0]))

    def row_losses(self, logprobs: Tensor) -> Tensor:
        return -logsigmoid(self.margins(logprobs))


class SFT(Objective):
    """NLL of positive responses, mean over rows.

    Args:
        rows: mappings with a token example ``example``.
        reduction: ``"mean"`` or ``"sum"`` over a response's tokens.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], *, reduction: str = "mean") -> None:
        super().__init__(rows, reduction=reduction)

    def sequences(self) -> list[Example]:
        return [row["example"] for row in self.rows]

    def _with_rows(self, index: Sequence[int]) -> Self:
        return type(self)([self.rows[i] for i in index], reduction=self.reduction)

    def row_losses(self, logprobs: Tensor) -> Tensor:
        return -logprobs[:, 0]


class Reward(Objective):
    """Negative expected reward, by its policy-gradient surrogate: -advantage_r logp(response_r), mean over rows.

    Advantages are rewards less their mean over their standard deviation (Williams 1992, REINFORCE with a baseline);
    the gradient is that of the negative expected reward where the responses are the model's own samples.

    Args:
        rows: mappings with a token example ``example`` and a finite ``reward``.
        reduction: ``"mean"`` or ``"sum"`` over a response's tokens.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], *, reduction: str = "mean") -> None:
        super().__init__(rows, reduction=reduction)
        rewards = torch.tensor([float(row["reward"]) for row in self.rows], dtype=torch.float64)
        if not rewards.isfinite().all():
            raise ValueError(
                f"[Reward] expected finite rewards, row {int((~rewards.isfinite()).nonzero()[0])} has another"
            )
        if len(rewards) < 2 or rewards.std() == 0:
            raise ValueError("[Reward] expected at least two different rewards: equal ones prefer nothing")
        self.advantages = (rewards - rewards.mean()) / rewards.std()

    def sequences(self) -> list[Example]:
        return [row["example"] for row in self.rows]

    def _with_rows(self, index: Sequence[int]) -> Self:
        part = type(self)(self.rows, reduction=self.reduction)
        part.rows = [self.rows[i] for i in index]
        part.advantages = self.advantages[list(index)]  # normalized over all rows, so that parts stay comparable
        return part

    def row_losses(self, logprobs: Tensor) -> Tensor:
        return -self.advantages.to(logprobs) * logprobs[:, 0]

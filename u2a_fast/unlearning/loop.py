"""The U2A loop: score, select, weigh, unlearn, look at held-out preferences, score again.

Corrected against the public release (u2a_fast docs/unlearning.md): gains are rescored at the parameters that they are
used at, only positive ones are unlearned, weights grow with the gain, and the loop ends when held-out preference loss
stops falling.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from u2a_fast.data.packing import Example, longest_examples
from u2a_fast.influence.derivatives import as_budget
from u2a_fast.influence.objectives import Objective
from u2a_fast.influence.scorer import InfluenceScorer, Scores
from u2a_fast.selection import Selection, exponentiated_gradient, released_exponentiated_gradient, select
from u2a_fast.store import read_budget, write_selection, write_text
from u2a_fast.unlearning.config import AlignConfig
from u2a_fast.unlearning.fingerprint import check_fingerprint, hash_examples, hash_model, hash_plain
from u2a_fast.unlearning.measure import example_of, mean_of_fitting, sample_positions
from u2a_fast.unlearning.rounds import RoundFiles, complete_rounds, drop_parameters
from u2a_fast.unlearning.run import save_model, train
from u2a_fast.unlearning.snapshot import ParameterSnapshot, restore

__all__ = ["AlignResult", "align"]

Progress = Callable[[int, str, int, int | None], None]
Rows = Iterable[Mapping[str, Any]]

_WINDOW = 2048  # negatives held in memory while scoring
ORIGINAL = -1  # the best "round" where no round lowered held-out preference loss


@dataclass(frozen=True)
class AlignResult:
    """How the loop went.

    Attributes:
        rounds: metrics of every round, as round-NN/metrics.json has them.
        best_round: the round whose parameters the model ends with; -1: the original's, as no round was better.
        stopped: why the loop ended: ``"rounds"`` (all done), ``"early stop"`` (held-out preference loss stopped
            falling) or ``"no gain"`` (no negative is worth unlearning any more).
        model_dir: the saved model.
    """

    rounds: list[dict[str, Any]]
    best_round: int
    stopped: str
    model_dir: Path


def _numbered(negatives: Rows) -> Iterator[Mapping[str, Any]]:
    for i, row in enumerate(negatives):
        yield row if "id" in row else {**row, "id": str(i)}


class _Loop:
    """What stays the same from round to round."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        negatives: Rows,
        objective: Objective,
        config: AlignConfig,
        retain: Sequence[Mapping[str, Any]],
        heldout: Objective | None,
        out: Path,
        on_progress: Progress | None,
    ) -> None:
        self.model, self.negatives, self.config, self.out = model, negatives, config, out
        self.retain, self.on_progress = retain, on_progress
        # one budget for all rounds: what does not fit in the first will not in the next
        self.budget = as_budget(config.token_budget_per_batch, next(model.parameters()).device)
        objective.prepare(model, token_budget=self.budget)
        if heldout is None:
            objective, heldout = objective.split(config.heldout_fraction, config.seed)
        self.objective = objective
        self.heldout = heldout.prepare(model, token_budget=self.budget)
        self.original = ParameterSnapshot(model)
        self.scorer = InfluenceScorer(
            model,
            tokenizer,
            objective,
            config.curvature,
            loss=config.unlearn.loss,
            npo_beta=config.unlearn.npo_beta,
            reduction=config.unlearn.reduction,
            damping=config.damping,
            token_budget=self.budget,
        )
        if iter(negatives) is negatives:
            raise TypeError("[align] expected negatives that can be iterated more than once, got an iterator")
        self.count = sum(1 for _ in negatives)
        self.sample = self._take(set(sample_positions(self.count, config.nll_sample, config.seed)))
        self.retain_sample = [
            example_of(retain[i]) for i in sample_positions(len(retain), config.nll_sample, config.seed)
        ]

    def _take(self, positions: set[int]) -> list[Example]:
        """The negatives at ``positions``, in rising order, in one pass over all."""
        return [row for i, row in enumerate(self.negatives) if i in positions]

    def fingerprint(self) -> dict[str, str]:
        parts = {
            "config": hash_plain(asdict(self.config)),
            "negatives": hash_examples(self.negatives),
            "retain": hash_examples(self.retain),
            "model": hash_model(self.model),
        }
        for name, objective in (("objective", self.objective), ("held-out objective", self.heldout)):
            options = {
                key: value.tolist() if isinstance(value, Tensor) else value
                for key, value in vars(objective).items()
                if isinstance(value, int | float | str | Tensor)
            }
            parts[name] = hash_plain([type(objective).__name__, options, hash_examples(objective.sequences())])
        return parts

    def report(self, number: int, stage: str, done: int, total: int | None) -> None:
        if self.on_progress is not None:
            self.on_progress(number, stage, done, total)

    def preference_losses(self) -> dict[str, float]:
        losses = {
            "preference_loss_train": self.objective.value(self.model, token_budget=self.budget),
            "preference_loss_heldout": self.heldout.value(self.model, token_budget=self.budget),
        }
        if not all(map(math.isfinite, losses.values())):
            raise FloatingPointError(f"[align] expected finite preference losses, got {losses}")
        return losses

    def mean_nll(self, examples: Sequence[Example]) -> float | None:
        if not examples:
            return None
        reduction = self.config.unlearn.reduction
        return mean_of_fitting(self.model, examples, reduction=reduction, token_budget=self.budget)

    def measure(self, chosen: Sequence[Example]) -> dict[str, float | None]:
        """Preference losses and mean NLLs (nats) of the chosen negatives, of a sample of all, and of positives."""
        return {
            **self.preference_losses(),
            "nll_selected": self.mean_nll(chosen),
            "nll_negatives": self.mean_nll(self.sample),
            "nll_retain": self.mean_nll(self.retain_sample),
        }

    def score(self, number: int) -> Scores:
        """Score all negatives at the model as it is, window by window."""
        self.scorer.reset()
        at_start = self.nll_reference() if number else None
        rows, parts, done = _numbered(self.negatives), [], 0
        while window := list(islice(rows, _WINDOW)):
            reference = None if at_start is None else at_start[done : done + len(window)].tolist()
            if number == done == 0 and self.count > _WINDOW:
                self.scorer.preflight(longest_examples(self.negatives), window)
            parts.append(self.scorer.score(window, nll_reference=reference))
            done += len(window)
            self.report(number, "score", done, self.count)
        columns = ("id", "score", "nll", "tokens", "exact", "fits")
        columns_of_all = {name: np.concatenate([getattr(p, name) for p in parts]) for name in columns}
        return Scores.from_columns(columns_of_all, parts[-1].report)

    def nll_reference(self) -> np.ndarray | None:
        """NLL (n) of all negatives at theta_0, where round 0 was scored; None where the loss has no use for it."""
        return RoundFiles(self.out, 0).nll() if self.config.unlearn.loss == "npo" else None

    def has_gain(self, scores: Scores) -> bool:
        """Whether any negative is worth unlearning, as far as ``select`` is not the one to say so."""
        score = scores.score[scores.fits]  # select leaves the others out
        if self.config.strategy == "as-released" or not np.isfinite(score).all():
            return len(score) > 0
        return bool((score > (self.config.threshold or 0.0)).any())

    def choose(self, scores: Scores, number: int) -> Selection:
        """Select, and step the weights on from those of the round before (1 for negatives that are new)."""
        c = self.config
        chosen = select(
            scores,
            strategy=c.strategy,
            k=c.k,
            threshold=c.threshold,
            token_budget=c.token_budget,
            nonfinite=c.nonfinite,
        )
        if c.weights == "uniform":
            return chosen
        before = RoundFiles(self.out, number - 1).weights() if number else {}
        start = np.array([before.get(str(i), 1.0) for i in chosen.id])
        if c.weights == "eg-released":
            step = 0.01 if c.eta is None else c.eta
            update = released_exponentiated_gradient(start, chosen.score, eta=step)
        else:
            step = 1.0 if c.eta is None else c.eta
            update = exponentiated_gradient(
                start, chosen.score, eta=step, transform=c.transform, clip=c.clip, min_ess=c.min_ess, cap=c.cap
            )
        return replace(chosen, weight=update.weight, temper=update.temper)

    def unlearn(self, number: int, selection: Selection) -> dict[str, Any]:
        """Unlearn the selection and say what it did."""
        weight = dict(zip(selection.index.tolist(), selection.weight.tolist(), strict=True))
        positions, chosen = sorted(weight), self._take(set(weight))
        before, at_start = self.measure(chosen), self.nll_reference()
        folder = RoundFiles(self.out, number).folder / "trainer"
        outcome = train(
            self.model,
            chosen,
            [weight[i] for i in positions],
            config=replace(self.config.unlearn, seed=self.config.unlearn.seed + number, save_every=None),
            folder=folder,
            retain=self.retain,
            reference=self.original,
            nll_reference=None if at_start is None else at_start[positions].tolist(),
            on_progress=lambda done, total: self.report(number, "unlearn", done, total),
        )
        shutil.rmtree(folder, ignore_errors=True)
        return {
            **{f"{key}_before": value for key, value in before.items()},
            **self.measure(chosen),
            "steps": outcome.steps,
            "drift": outcome.drift,
            "stopped_by_drift": outcome.stopped_by_drift,
        }

    def run_round(self, number: int) -> dict[str, Any] | None:
        """One round from the model as it is; None where no negative is worth unlearning."""
        files = RoundFiles(self.out, number)
        files.start_over()
        scores = self.score(number)
        files.write_scores(scores)
        if not self.has_gain(scores):
            return None
        selection = self.choose(scores, number)
        write_selection(files.selection, selection)
        metrics = {
            "round": number,
            "selected": len(selection),
            "effective_sample_size": selection.effective_sample_size,
            "temper": selection.temper,
            "nonfinite": scores.nonfinite,
            "unfit": int((~scores.fits).sum()),
            **_against_float32(scores),
            "predicted_gain_rate": float(selection.score @ selection.weight) / len(selection),
            **self.unlearn(number, selection),
        }
        files.finish(self.model, metrics, self.budget.found)
        return metrics


def _against_float32(scores: Scores) -> dict[str, Any]:
    """What the report says of 16-bit scores; nothing of wider ones."""
    found = scores.report.float32_spearman if scores.report is not None else None
    return {} if found is None else {"float32_spearman": found}


def _best(rounds: Sequence[Mapping[str, Any]]) -> int:
    """The round of lowest held-out preference loss, the earliest of equals; -1 where the original's is as low."""
    if not rounds:
        return ORIGINAL
    losses = [rounds[0]["preference_loss_heldout_before"], *(row["preference_loss_heldout"] for row in rounds)]
    return int(np.argmin(losses)) - 1


def align(
    model: nn.Module,
    tokenizer: Any,
    negatives: Rows,
    objective: Objective,
    *,
    config: AlignConfig | None = None,
    retain: Sequence[Mapping[str, Any]] | None = None,
    heldout: Objective | None = None,
    output_dir: Path | str,
    on_progress: Progress | None = None,
) -> AlignResult:
    """Rounds of scoring negatives against a preference objective and unlearning those that help, in place.

    The model given is theta_0 in every round: the proximal center and the reference of DPO, NPO and KL. The model ends
    with the parameters of the best round on held-out preferences. A run that was cut off, however, resumes after its
    last whole round when called again with the same arguments and the original model, and ends in the same parameters.

    Args:
        model: a transformers causal LM or a PEFT model around one; its trainable parameters are scored and trained.
        tokenizer: saved beside the model; None: not saved.
        negatives: token examples, optionally with an ``id`` (distinct; else their position), iterable more than once.
        objective: ``DPO``, ``Reward`` or ``SFT`` on the preference rows.
        config: what to do; None: the defaults.
        retain: positives for the retain term, token examples or rows with an ``example``.
        heldout: the objective on rows that scores never see; None: ``config.heldout_fraction`` of the objective's rows.
        output_dir: gets ``round-NN/``, ``metrics.json`` (one dict a round) and ``model/``.
        on_progress: called with (round, "score" or "unlearn", done, in all).

    Raises:
        ValueError: arguments contradict each other, or ``output_dir`` holds another run.
        FloatingPointError: a loss became NaN or infinite; whole rounds stay on disk.
    """
    config, out = config or AlignConfig(), Path(output_dir)
    loop = _Loop(model, tokenizer, negatives, objective, config, retain or (), heldout, out, on_progress)
    check_fingerprint(out / "align.json", loop.fingerprint())
    rounds, stopped = complete_rounds(out), ""
    if rounds:
        last = RoundFiles(out, len(rounds) - 1)
        restore(model, last.parameters)
        loop.budget.found |= read_budget(last.folder)
    while not stopped:
        best = _best(rounds)
        drop_parameters(out, {best, len(rounds) - 1})
        if len(rounds) - 1 - best >= config.patience and rounds:
            stopped = "early stop"
        elif len(rounds) == config.rounds:
            stopped = "rounds"
        elif (metrics := loop.run_round(len(rounds))) is None:
            stopped = "no gain"
        else:
            rounds.append(metrics)
            write_text(out / "metrics.json", json.dumps(rounds, indent=2) + "\n")
    best = _best(rounds)
    restore(model, loop.original.values if best == ORIGINAL else RoundFiles(out, best).parameters)
    write_text(out / "metrics.json", json.dumps(rounds, indent=2) + "\n")
    save_model(model, tokenizer, out / "model")
    return AlignResult(rounds, best, stopped, out / "model")

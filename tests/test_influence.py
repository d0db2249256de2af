"""Scores mean what they say: gains of the true inner solution, gradients of the true objective, nothing hidden."""

import math

import numpy as np
import pytest
import tiny_models as tiny
import torch
from torch import Tensor, nn

import u2a_fast
from u2a_fast.curvature.diagonal import DiagonalFisher
from u2a_fast.data.packing import plan_batches
from u2a_fast.influence.signal import _row_derivatives
from u2a_fast.losses import unlearning_loss, unlearning_slope
from u2a_fast.models.decoder import sequence_logprobs
from u2a_fast.statistics import auc, bootstrap_interval, ranks, spearman


def pairs(count: int, seed: int = 0) -> list[dict[str, dict[str, list[int]]]]:
    chosen, rejected = tiny.examples(count, seed + 100), tiny.examples(count, seed + 200)
    return [{"chosen": c, "rejected": r} for c, r in zip(chosen, rejected, strict=True)]


def rewarded(count: int) -> list[dict[str, object]]:
    return [{"example": e, "reward": float(i % 3)} for i, e in enumerate(tiny.examples(count, 7))]


def objectives() -> dict[str, u2a_fast.influence.objectives.Objective]:
    return {
        "dpo": u2a_fast.DPO(pairs(5), beta=0.3),
        "sft": u2a_fast.SFT([{"example": e} for e in tiny.examples(6, 5)]),
        "reward": u2a_fast.Reward(rewarded(7), reduction="sum"),
    }


def plain_loss(name: str, model: nn.Module, reference: nn.Module) -> Tensor:
    """Each objective once more, by the model's own loss and from its definition."""
    if name == "dpo":
        losses = []
        for row in pairs(5):
            now = [-tiny.own_nll(model, row[key], "sum") for key in ("chosen", "rejected")]
            with torch.no_grad():
                then = [-tiny.own_nll(reference, row[key], "sum") for key in ("chosen", "rejected")]
            losses.append(-torch.log(torch.sigmoid(0.3 * ((now[0] - then[0]) - (now[1] - then[1])))))
        return torch.stack(losses).mean()
    if name == "sft":
        return torch.stack([tiny.own_nll(model, e) for e in tiny.examples(6, 5)]).mean()
    rewards = torch.tensor([row["reward"] for row in rewarded(7)], dtype=torch.float64)
    advantages = (rewards - rewards.mean()) / rewards.std()
    nll = torch.stack([tiny.own_nll(model, row["example"], "sum") for row in rewarded(7)])
    return (advantages * nll).mean()


@pytest.mark.parametrize("name", ["dpo", "sft", "reward"])
def test_objective_value_and_gradient(name: str) -> None:
    reference, model = tiny.build("llama"), tiny.build("llama", seed=1)
    objective = objectives()[name].prepare(reference)
    want = plain_loss(name, model, reference)
    grads = torch.autograd.grad(want, list(model.parameters()))
    for budget in (1, 30, 10_000):
        assert objective.value(model, token_budget=budget) == pytest.approx(want.item(), rel=1e-12)
        got = objective.gradient(model, token_budget=budget)
        for (parameter_name, _), grad in zip(model.named_parameters(), grads, strict=True):
            torch.testing.assert_close(got[parameter_name], grad, rtol=1e-9, atol=1e-12)


def test_reference_is_fixed_once() -> None:
    first, moved = tiny.build("llama"), tiny.build("llama", seed=1)
    objective = objectives()["dpo"].prepare(first)
    assert objective.value(first) == pytest.approx(math.log(2), rel=1e-12)
    before = objective.value(moved)
    assert objective.prepare(moved).value(moved) == before
    with pytest.raises(RuntimeError, match=r"\[DPO\] expected prepare\(model\) before use"):
        u2a_fast.DPO(pairs(2)).value(first)


def test_split_is_a_partition_that_keeps_the_reference() -> None:
    model = tiny.build("llama")
    objective = u2a_fast.DPO(pairs(9)).prepare(model)
    train, held_out = objective.split(0.3, seed=4)
    assert (len(train.rows), len(held_out.rows)) == (6, 3)
    moved = tiny.build("llama", seed=1)
    whole = objective.losses(moved).sum()
    torch.testing.assert_close(train.losses(moved).sum() + held_out.losses(moved).sum(), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [[], [{"example": tiny.examples(1)[0], "reward": 1.0}] * 3])
def test_rewards_that_prefer_nothing_are_refused(rows: list[dict[str, object]]) -> None:
    with pytest.raises(ValueError, match=r"\[Reward\] expected at least"):
        u2a_fast.Reward(rows)


def test_nan_reward_is_refused() -> None:
    rows = rewarded(3)
    rows[1]["reward"] = float("nan")
    with pytest.raises(ValueError, match="row 1 has another"):
        u2a_fast.Reward(rows)


def _inner_solution(model: nn.Module, example: dict[str, list[int]], weight: float, prox: float) -> None:
    """Move ``model`` to argmin weight * (-NLL) + prox ||theta - theta_0||^2 by fixed-point iteration."""
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(12):
        grads = torch.autograd.grad(-tiny.own_nll(model, example), list(model.parameters()))
        with torch.no_grad():
            for p, p0, g in zip(model.parameters(), start, grads, strict=True):
                p.copy_(p0 - weight * g / (2 * prox))


def test_scores_are_gains_of_the_true_inner_solution() -> None:
    """s_i = -dL_PA/dw_i at w = 0: the proximal inner problem is solved for +-weight and differenced.

    GPT-2, because all of it computes in float64 (Llama's norms round to float32, which differences would amplify).
    """
    objective = u2a_fast.DPO(pairs(4), beta=0.3).prepare(tiny.build("gpt2"))
    at = tiny.build("gpt2", seed=2)  # away from the reference, so that all of DPO's terms count
    negatives, prox, weight = tiny.examples(3, 11), 50.0, 1e-4
    scores = u2a_fast.InfluenceScorer(at, None, objective).score(negatives).score / (2 * prox)
    for example, score in zip(negatives, scores, strict=True):
        values = []
        for sign in (1, -1):
            model = tiny.build("gpt2", seed=2)
            _inner_solution(model, example, sign * weight, prox)
            values.append(objective.value(model))
        assert -(values[0] - values[1]) / (2 * weight) == pytest.approx(score, rel=1e-5)


def test_score_fields_and_any_budget() -> None:
    model, negatives = tiny.build("qwen2"), tiny.examples(8, 3)
    negatives[2] = {**negatives[2], "id": "two"}
    objective = u2a_fast.SFT([{"example": e} for e in tiny.examples(3, 9)])
    with tiny.true_float64():
        scores = u2a_fast.InfluenceScorer(model, None, objective, token_budget=25).score(iter(negatives))
        v = objective.gradient(model)
        want = -tiny.per_example(model, negatives, v).numpy()
        nll = [tiny.own_nll(model, e).item() for e in negatives]
    assert list(scores.id) == ["0", "1", "two", "3", "4", "5", "6", "7"]
    assert list(scores.tokens) == [sum(label != -100 for label in e["labels"][1:]) for e in negatives]
    np.testing.assert_allclose(scores.nll, nll, rtol=1e-12)
    np.testing.assert_allclose(scores.score, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())
    assert scores.nonfinite == 0 and len(scores) == 8


def test_npo_score_follows_the_model_away_from_its_reference() -> None:
    model, negatives = tiny.build("llama"), tiny.examples(5, 3)
    objective = u2a_fast.SFT([{"example": e} for e in tiny.examples(3, 9)])
    ga = u2a_fast.InfluenceScorer(model, None, objective, loss="ga").score(negatives)
    npo = u2a_fast.InfluenceScorer(model, None, objective, loss="npo", npo_beta=0.7)
    np.testing.assert_array_equal(npo.score(negatives).score, ga.score)
    reference = ga.nll - np.linspace(-2, 3, 5)
    want = ga.score * 2 / (1 + np.exp(0.7 * (ga.nll - reference)))
    np.testing.assert_allclose(npo.score(negatives, nll_reference=reference).score, want, rtol=1e-12)


@pytest.mark.parametrize("name", ["ga", "npo", "graddiff"])
def test_slope_is_the_derivative_of_the_loss(name: str) -> None:
    nll = torch.linspace(-3, 40, 50, dtype=torch.float64, requires_grad=True)
    reference = torch.full_like(nll, 5.0).detach()
    (want,) = torch.autograd.grad(unlearning_loss(name, nll, reference, 0.3).sum(), nll)
    torch.testing.assert_close(unlearning_slope(name, nll.detach(), reference, 0.3), want, rtol=1e-12, atol=0)


def test_diagonal_fisher() -> None:
    model, sample = tiny.build("llama"), tiny.examples(5, 21)
    names = ["lm_head.weight", "model.norm.weight"]
    fisher = DiagonalFisher(model, sample, names, damping=0.5)
    parameters = [dict(model.named_parameters())[name] for name in names]
    squares = [torch.autograd.grad(tiny.own_nll(model, e), parameters) for e in sample]
    want = [torch.stack([g[i] ** 2 for g in squares]).mean(0) for i in range(2)]
    for name, diagonal in zip(names, want, strict=True):
        torch.testing.assert_close(fisher.diagonal[name], diagonal, rtol=1e-9, atol=1e-15)
    mu = 0.5 * torch.cat([w.flatten() for w in want]).mean()
    gradient = {name: torch.ones_like(w) for name, w in zip(names, want, strict=True)}
    solved = fisher.solve(gradient)
    torch.testing.assert_close(solved[names[0]] * (want[0] + mu), gradient[names[0]], rtol=1e-9, atol=1e-12)


def test_fisher_scores_and_reset() -> None:
    model, negatives = tiny.build("llama"), tiny.examples(6, 3)
    objective = u2a_fast.SFT([{"example": e} for e in tiny.examples(3, 9)])
    scorer = u2a_fast.InfluenceScorer(model, None, objective, "fisher", damping=0.2)
    with tiny.true_float64():
        scores = scorer.score(negatives).score
        fisher = DiagonalFisher(model, negatives, scorer.names, damping=0.2)
        want = -tiny.per_example(model, negatives, fisher.solve(objective.gradient(model))).numpy()
    np.testing.assert_allclose(scores, want, rtol=1e-8, atol=1e-8 * np.abs(want).max())
    first = scorer.direction()
    assert scorer.direction() is first
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    scorer.reset()
    assert not np.allclose(scorer.score(negatives).score, scores, rtol=1e-3)


def test_nan_scores_are_kept_and_counted() -> None:
    model = tiny.build("llama")
    objective = u2a_fast.SFT([{"example": {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}}])
    scorer = u2a_fast.InfluenceScorer(model, None, objective)
    scorer.direction()
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    good, bad = {"input_ids": [3, 4], "labels": [-100, 4]}, {"input_ids": [60, 4], "labels": [-100, 4]}
    scores = scorer.score([good, bad, good])
    assert np.isfinite(scores.score[[0, 2]]).all() and np.isnan(scores.score[1])
    assert scores.nonfinite == 1


def test_unknown_options_are_named() -> None:
    model, objective = tiny.build("llama"), u2a_fast.SFT([{"example": tiny.examples(1)[0]}])
    with pytest.raises(ValueError, match='expected curvature "identity", "fisher" or an object, got \'kfac\''):
        u2a_fast.InfluenceScorer(model, None, objective, "kfac")
    with pytest.raises(ValueError, match="expected one of .*'npo'.* got 'rmu'"):
        u2a_fast.InfluenceScorer(model, None, objective, loss="rmu")
    with pytest.raises(ValueError, match=r"matches no parameter of LlamaForCausalLM"):
        u2a_fast.InfluenceScorer(model, None, objective, parameters="lora")
    with pytest.raises(ValueError, match=r"kinds out of .* got \['weights'\]"):
        u2a_fast.InfluenceScorer(model, None, objective, parameters="weights")
    for damping in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"expected a finite damping > 0, got {damping}"):
            u2a_fast.InfluenceScorer(model, None, objective, "fisher", damping=damping)
    u2a_fast.InfluenceScorer(model, None, objective, damping=0.0)


def test_sequence_logprobs_differentiates_like_the_model() -> None:
    model, batch = tiny.build("gemma2"), tiny.examples(5)
    for reduction in ("sum", "mean"):
        got = sequence_logprobs(model, batch, reduction=reduction)
        want = -torch.stack([tiny.own_nll(model, e, reduction) for e in batch])
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # Gemma's norms round to float32
        weights = torch.linspace(-1, 2, 5, dtype=torch.float64)
        ours = torch.autograd.grad(got @ weights, list(model.parameters()))
        theirs = torch.autograd.grad(want @ weights, list(model.parameters()))
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_signal_of_consistent_preferences_generalizes() -> None:
    """Every pair prefers token 5 to 6: halves agree, and the row derivatives average to the gradients' product."""
    model = tiny.build("gpt2")
    prompts = [e["input_ids"] for e in tiny.examples(24, 31)]
    row = lambda ids, token: {"input_ids": [*ids, token], "labels": [*[-100] * len(ids), token]}  # noqa: E731
    objective = u2a_fast.DPO([{"chosen": row(ids, 5), "rejected": row(ids, 6)} for ids in prompts])
    scorer = u2a_fast.InfluenceScorer(model, None, objective)
    negatives = tiny.examples(30, 41)
    report = u2a_fast.signal_check(scorer, negatives, seed=3)
    assert report.generalizes and report.warning is None
    assert report.cosine_ci[0] > 0 and report.spearman > 0
    halves = objective.split(0.5, 3)
    gradients = [half.gradient(model) for half in halves]
    product = sum((gradients[0][name] * gradients[1][name]).sum() for name in gradients[0]).item()
    assert _row_derivatives(scorer, halves[0], gradients[1], scorer.budget).mean() == pytest.approx(product, rel=1e-9)
    assert u2a_fast.signal_check(scorer, negatives, seed=3) == report


def test_signal_of_coin_flips_does_not_generalize() -> None:
    """Labels by coin: over 20 sets of pairs, a 95 % interval lies above zero about once in 40, five times never."""
    model, rng = tiny.build("llama"), np.random.default_rng(0)
    found = 0
    for trial in range(20):
        rows = pairs(10, seed=1000 * trial)
        for row in rows:
            if rng.random() < 0.5:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        report = u2a_fast.signal_check(u2a_fast.InfluenceScorer(model, None, u2a_fast.DPO(rows)), tiny.examples(4, 41))
        found += report.generalizes
        assert report.generalizes == (report.warning is None)
    assert found < 5


def test_plan_batches() -> None:
    lengths = [5, 3, 9, 1, 1, 20, 4]
    plan = plan_batches(lengths, 10)
    assert sorted(i for batch in plan for i in batch) == list(range(7))
    assert all(sum(lengths[i] for i in batch) <= 10 or len(batch) == 1 for batch in plan)
    assert plan == plan_batches(lengths, 10) and plan[0] == [5]
    with pytest.raises(ValueError, match="expected token_budget >= 1, got 0"):
        plan_batches(lengths, 0)


def test_statistics() -> None:
    x = np.array([3.0, 1.0, 2.0, 2.0])
    np.testing.assert_array_equal(ranks(x), [3.0, 0.0, 1.5, 1.5])
    assert spearman(x, 2 * x**3) == pytest.approx(1.0) and math.isnan(spearman(x, np.ones(4)))
    assert auc(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == 0.875
    low, high = bootstrap_interval(lambda v: float(v.mean()), np.arange(100.0))
    assert low < 49.5 < high and 8 < high - low < 15  # normal theory: 2 * 1.96 * 29 / 10 = 11.4


def test_statistics_of_nan_are_nan() -> None:
    x = np.array([1.0, 2.0, float("nan")])
    assert (
        math.isnan(spearman(x, np.arange(3.0))) and math.isnan(auc(x, np.zeros(1))) and math.isnan(auc(np.zeros(1), x))
    )


def test_signal_check_leaves_the_scores_as_they_were() -> None:
    model, negatives = tiny.build("llama"), tiny.examples(6, 3)
    objective = u2a_fast.DPO(pairs(4)).prepare(model)
    plain = u2a_fast.InfluenceScorer(model, None, objective, "fisher").score(negatives)
    checked = u2a_fast.InfluenceScorer(model, None, objective, "fisher")
    u2a_fast.signal_check(checked, tiny.examples(5, 77))
    np.testing.assert_array_equal(checked.score(negatives).score, plain.score)

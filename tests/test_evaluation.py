"""Evaluation against one example at a time through plain transformers, and its behaviour at the edges."""

import copy
import json
import math

import numpy as np
import pytest
import tiny_models
import torch
from torch import nn

from u2a_fast.evaluation import evaluate, mean_nll

LOG2 = math.log(2)


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    return tiny_models.build("llama")


@pytest.fixture(scope="module")
def model(reference: nn.Module) -> nn.Module:
    moved = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return moved


def pairs(count: int) -> list[dict[str, dict[str, list[int]]]]:
    chosen, rejected = tiny_models.examples(count, seed=1), tiny_models.examples(count, seed=2)
    return [{"chosen": c, "rejected": r} for c, r in zip(chosen, rejected, strict=True)]


def own_logprob(model: nn.Module, example: dict[str, list[int]]) -> float:
    return -tiny_models.own_nll(model, example, "sum").item()


def test_likelihoods_are_the_models_own(model: nn.Module, reference: nn.Module) -> None:
    examples = tiny_models.examples(9)
    out = evaluate(model, negatives=examples, positives=[{"example": e} for e in examples], reference=reference)
    now = np.array([tiny_models.own_nll(model, e).item() for e in examples])
    before = np.array([tiny_models.own_nll(reference, e).item() for e in examples])
    # float64 models and NLLs of order 1 to 10: a hundred roundings are far below 1e-12
    np.testing.assert_allclose(mean_nll(model, examples), now, rtol=1e-12)
    for part in (out["forgetting"], out["utility"]):
        assert part["rows"] == 9
        assert part["tokens"] == sum(sum(y != -100 for y in e["labels"][1:]) for e in examples)
        assert part["nll"] == pytest.approx(now.mean(), rel=1e-12)
        assert part["nll_rise"] == pytest.approx((now - before).mean(), rel=1e-9)
        assert part["perplexity"] == pytest.approx(math.exp(now.mean()), rel=1e-12)
        assert part["nll_ci"][0] < part["nll"] < part["nll_ci"][1]


def test_preference_follows_from_log_probabilities(model: nn.Module, reference: nn.Module) -> None:
    rows, beta = pairs(11), 0.3
    out = evaluate(model, preferences=rows, reference=reference, beta=beta)["preference"]
    margins = np.array([own_logprob(model, r["chosen"]) - own_logprob(model, r["rejected"]) for r in rows])
    before = np.array([own_logprob(reference, r["chosen"]) - own_logprob(reference, r["rejected"]) for r in rows])
    rewards = beta * (margins - before)
    assert out["pairs"] == 11
    assert out["logprob_accuracy"] == (margins > 0).mean()
    assert out["reward_accuracy"] == (rewards > 0).mean()
    assert out["reward_margin"] == pytest.approx(rewards.mean(), rel=1e-9)
    assert out["loss"] == pytest.approx(np.log1p(np.exp(-rewards)).mean(), rel=1e-9)


def test_a_model_against_itself_is_undecided(model: nn.Module) -> None:
    out = evaluate(model, preferences=pairs(6), negatives=tiny_models.examples(4), reference=model)
    assert out["preference"]["loss"] == pytest.approx(LOG2, abs=1e-15)
    assert out["preference"]["reward_accuracy"] == 0.5
    assert out["forgetting"]["nll_rise"] == 0.0


def test_without_a_reference_only_absolute_figures_are_given(model: nn.Module) -> None:
    out = evaluate(model, preferences=pairs(4), positives=tiny_models.examples(4))
    assert set(out) == {"preference", "utility"}
    assert set(out["preference"]) == {"pairs", "nonfinite", "logprob_accuracy", "logprob_accuracy_ci"}
    assert "nll_rise" not in out["utility"]
    json.dumps(out, allow_nan=False)


def test_streams_and_batches_give_the_same_figures(model: nn.Module) -> None:
    examples = tiny_models.examples(13)
    whole = evaluate(model, negatives=examples)["forgetting"]
    streamed = evaluate(model, negatives=iter(examples), token_budget=20)["forgetting"]
    assert streamed["nll"] == pytest.approx(whole["nll"], rel=1e-12)
    assert streamed["rows"] == whole["rows"]


def test_nonfinite_figures_are_counted_and_kept(model: nn.Module) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(broken.parameters()))[7] = float("nan")  # the embedding of one token
    examples = tiny_models.examples(20)
    out = evaluate(broken, negatives=examples)["forgetting"]
    hit = sum(7 in e["input_ids"][: max(t for t, y in enumerate(e["labels"]) if y != -100)] for e in examples)
    assert 0 < hit < 20
    assert out["nonfinite"] == hit
    assert math.isnan(out["nll"])


def test_wrong_calls_are_named(model: nn.Module) -> None:
    with pytest.raises(
        ValueError, match=r"\[evaluate\] expected preferences, negatives or positives, got none of them"
    ):
        evaluate(model)
    with pytest.raises(ValueError, match=r"\[evaluate\] expected at least one row for forgetting, got none"):
        evaluate(model, negatives=iter([]))
    with pytest.raises(ValueError, match=r"\[DPO\] expected at least one row"):
        evaluate(model, preferences=[])

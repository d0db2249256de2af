"""Selection and weights: properties, and the sign against the true solution of a convex inner problem."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from u2a_fast.selection import (
    effective_sample_size,
    exponentiated_gradient,
    released_exponentiated_gradient,
    select,
)

EPS = np.finfo(np.float64).eps
SUM_ERROR = 64 * EPS  # relative error of a few sums of at most 40 positive terms

scores_lists = st.lists(
    st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda x: round(x, 6)), min_size=1, max_size=40
).map(np.array)
transforms = st.sampled_from(["rank", "clip"])


def table(score: list[float], tokens: list[int] | None = None) -> SimpleNamespace:
    ids = np.array([f"n{i}" for i in range(len(score))], dtype=object)
    return SimpleNamespace(id=ids, score=np.array(score, dtype=float), tokens=np.array(tokens or [1] * len(score)))


@st.composite
def weighted_scores(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    scores = draw(scores_lists)
    weights = draw(st.lists(st.floats(0.01, 100), min_size=len(scores), max_size=len(scores)))
    return np.array(weights), scores


@given(weighted_scores(), transforms, st.floats(0, 20), st.floats(0, 1), st.sampled_from([None, 1.0, 1.5, 4.0]))
@settings(max_examples=200, deadline=None)
def test_weights_lie_on_the_simplex_above_the_floor_and_below_the_cap(problem, transform, eta, floor, cap):
    weights, scores = problem
    update = exponentiated_gradient(weights, scores, eta=eta, transform=transform, min_ess=floor, cap=cap)
    n = len(scores)
    assert (update.weight >= 0).all()
    assert abs(update.weight.sum() - n) <= SUM_ERROR * n
    assert update.effective_sample_size >= floor * n * (1 - SUM_ERROR)
    assert update.effective_sample_size == effective_sample_size(update.weight)
    if cap is not None:
        assert update.weight.max() <= cap * (1 + SUM_ERROR)


@given(scores_lists, transforms, st.floats(0, 20), st.sampled_from([None, 1.5]))
@settings(max_examples=100, deadline=None)
def test_weights_rise_with_the_gain_from_equal_weights(scores, transform, eta, cap):
    w = exponentiated_gradient(np.ones(len(scores)), scores, eta=eta, transform=transform, cap=cap).weight
    ordered = w[np.argsort(scores, kind="stable")]
    assert (np.diff(ordered) >= -SUM_ERROR * ordered[:-1]).all()


@given(weighted_scores(), transforms, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_weights_follow_a_permutation(problem, transform, random):
    weights, scores = problem
    order = np.array(random.sample(range(len(scores)), len(scores)))
    plain = exponentiated_gradient(weights, scores, transform=transform)
    moved = exponentiated_gradient(weights[order], scores[order], transform=transform)
    # the temper is found by bisection on a sum whose order changed: square root of its rounding, at worst
    np.testing.assert_allclose(moved.weight, plain.weight[order], rtol=EPS**0.5)


def test_an_outlier_does_not_take_all_the_weight():
    scores = np.concatenate([np.linspace(0.1, 1, 199), [1e4]])
    raw = np.exp(scores / scores.std() - (scores / scores.std()).max())
    assert effective_sample_size(raw) < 3
    for transform in ("rank", "clip"):
        update = exponentiated_gradient(np.ones(200), scores, transform=transform, min_ess=0)
        assert update.effective_sample_size > 80
        assert update.temper == 1.0


def test_the_floor_tempers_the_step_and_no_further():
    scores = np.linspace(-1, 1, 50)
    free = exponentiated_gradient(np.ones(50), scores, eta=8, min_ess=0)
    held = exponentiated_gradient(np.ones(50), scores, eta=8, min_ess=0.6)
    assert free.effective_sample_size < 30 and 0 < held.temper < 1
    assert held.effective_sample_size == pytest.approx(30, rel=1e-9)
    same = exponentiated_gradient(np.ones(50), scores, eta=8 * held.temper, min_ess=0)
    np.testing.assert_allclose(held.weight, same.weight, rtol=1e-9)


def test_zero_weights_stay_zero_and_the_sparsity_term_favors_large_weights():
    w = exponentiated_gradient(np.array([0.0, 1.0, 2.0]), np.array([3.0, 2.0, 1.0]), min_ess=0.9).weight
    assert w[0] == 0 and w.sum() == pytest.approx(3)
    before = np.array([0.5, 1.5])
    after = exponentiated_gradient(before, np.zeros(2), sparsity=0.4, min_ess=0).weight
    expected = before * np.exp(-0.2 / np.sqrt(before))
    np.testing.assert_allclose(after, 2 * expected / expected.sum())


class InnerProblem:
    """theta*(w) = argmin sum_i w_i (-NLL_i) + lam ||theta - theta_0||^2, logistic regression, solved by Newton."""

    def __init__(self, seed: int, n: int = 30, d: int = 5) -> None:
        rng = np.random.default_rng(seed)
        self.x, self.y = rng.normal(size=(n, d)), rng.choice([-1.0, 1.0], size=n)
        self.x_pa, self.y_pa = rng.normal(size=(20, d)), rng.choice([-1.0, 1.0], size=20)
        self.start = rng.normal(size=d)
        # NLL's Hessian is at most |x|^2 / 4: this keeps the inner problem convex for all weights of mean 1 used here
        self.lam = 0.25 * np.linalg.norm(self.x.T @ self.x, 2)

    @staticmethod
    def nll(x, y, theta):
        return np.logaddexp(0, -y * (x @ theta))

    @staticmethod
    def grads(x, y, theta):
        return -(y / (1 + np.exp(y * (x @ theta))))[:, None] * x

    def hessian(self, w, theta):
        p = 1 / (1 + np.exp(-self.x @ theta))
        return 2 * self.lam * np.eye(len(theta)) - (self.x * (w * p * (1 - p))[:, None]).T @ self.x

    def solve(self, w):
        theta = self.start.copy()
        for _ in range(60):
            gradient = -w @ self.grads(self.x, self.y, theta) + 2 * self.lam * (theta - self.start)
            theta = theta - np.linalg.solve(self.hessian(w, theta), gradient)
        return theta

    def preference_loss(self, w):
        return self.nll(self.x_pa, self.y_pa, self.solve(w)).mean()

    def gains(self, w):
        theta = self.solve(w)
        grad_pa = self.grads(self.x_pa, self.y_pa, theta).mean(0)
        v = np.linalg.solve(self.hessian(w, theta), grad_pa)
        return -self.grads(self.x, self.y, theta) @ v


@pytest.mark.parametrize("seed", range(5))
def test_the_gain_is_the_fall_of_the_preference_loss_per_unit_of_weight(seed):
    problem, w, h = InnerProblem(seed), np.ones(30), 1e-5
    steps = h * np.eye(30)
    slope = [(problem.preference_loss(w + e) - problem.preference_loss(w - e)) / (2 * h) for e in steps]
    # central differences: truncation h^2 and rounding EPS / h, each below 1e-10
    np.testing.assert_allclose(problem.gains(w), -np.array(slope), atol=1e-10)


@pytest.mark.parametrize("seed", range(10))
def test_our_weights_lower_the_preference_loss_and_the_released_ones_raise_it(seed):
    problem, w = InnerProblem(seed), np.ones(30)
    start, gains = problem.preference_loss(w), problem.gains(w)
    for transform in ("rank", "clip"):
        ours = exponentiated_gradient(w, gains, eta=0.3, transform=transform).weight
        assert problem.preference_loss(ours) < start
    released = released_exponentiated_gradient(w, gains, eta=0.3 / gains.std())
    assert problem.preference_loss(released.weight) > start


def test_top_k_takes_the_best_positive_gains_and_breaks_ties_by_position():
    chosen = select(table([0.5, -1.0, 2.0, 0.5, 0.0, 0.5]), k=3)
    assert chosen.index.tolist() == [2, 0, 3] and chosen.id.tolist() == ["n2", "n0", "n3"]
    assert chosen.score.tolist() == [2.0, 0.5, 0.5] and chosen.weight.tolist() == [1.0, 1.0, 1.0]
    assert select(table([0.5, -1.0, 2.0]), k=10).index.tolist() == [2, 0]


def test_as_released_keeps_top_k_whatever_the_sign():
    chosen = select(table([-1.0, -3.0, 2.0]), strategy="as-released", k=2, weights="eg-released", eta=0.1)
    assert chosen.index.tolist() == [2, 0]
    assert chosen.weight[0] < 1 < chosen.weight[1]


def test_a_threshold_is_a_number():
    with pytest.raises(ValueError, match="expected a number as threshold, got nan"):
        select(table([0.5, 1.0]), strategy="threshold", threshold=float("nan"))


def test_threshold_is_strict_and_defaults_to_zero():
    scores = table([0.0, 0.1, -0.2, 0.3])
    assert select(scores, strategy="threshold").index.tolist() == [3, 1]
    assert select(scores, strategy="threshold", threshold=0.1).index.tolist() == [3]
    assert select(scores, strategy="threshold", threshold=-0.2).index.tolist() == [3, 1, 0]


@given(st.lists(st.tuples(st.floats(0.01, 10), st.integers(1, 20)), min_size=1, max_size=9), st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_a_budget_is_kept_and_reaches_half_of_the_best_total(items, budget):
    score, tokens = np.array([s for s, _ in items]), np.array([t for _, t in items])
    if tokens.min() > budget:
        with pytest.raises(ValueError, match="none of"):
            select(table(score.tolist(), tokens.tolist()), strategy="budget", token_budget=budget)
        return
    chosen = select(table(score.tolist(), tokens.tolist()), strategy="budget", token_budget=budget).index
    assert tokens[chosen].sum() <= budget
    subsets = (list(c) for k in range(1, len(items) + 1) for c in combinations(range(len(items)), k))
    best = max(score[c].sum() for c in subsets if tokens[c].sum() <= budget)
    assert score[chosen].sum() >= best / 2 * (1 - SUM_ERROR)


def test_a_budget_prefers_gain_per_token():
    chosen = select(table([3.0, 2.0, 2.0, -1.0], [10, 5, 5, 1]), strategy="budget", token_budget=10)
    assert chosen.index.tolist() == [1, 2]
    # one example that is worth more than all the dense ones leads
    chosen = select(table([1.0, 50.0], [1, 100]), strategy="budget", token_budget=100)
    assert chosen.index.tolist() == [1]


def test_scores_that_are_not_finite_are_refused_or_dropped_and_counted():
    scores = table([1.0, float("nan"), float("inf"), 2.0])
    with pytest.raises(ValueError, match="2 of 4 are not .first: id 'n1'."):
        select(scores, k=2)
    chosen = select(scores, k=4, nonfinite="drop")
    assert chosen.index.tolist() == [3, 0] and chosen.dropped_nonfinite == 2


def test_eg_weights_of_a_selection_rise_with_the_gain():
    chosen = select(table([1.0, 3.0, 2.0, -1.0]), k=3, weights="eg", min_ess=0)
    assert chosen.index.tolist() == [1, 2, 0]
    assert (np.diff(chosen.weight) < 0).all() and chosen.weight.mean() == pytest.approx(1)
    assert chosen.effective_sample_size < 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "best"}, "expected strategy out of"),
        ({"weights": "hard"}, "expected weights out of"),
        ({"nonfinite": "zero"}, "expected nonfinite"),
        ({}, "expected k >= 1"),
        ({"k": 0}, "expected k >= 1"),
        ({"strategy": "budget"}, "expected token_budget >= 1"),
        ({"k": 1, "weights": "eg", "min_ess": 2}, "min_ess=2"),
        ({"k": 1, "weights": "eg", "transform": "log"}, "expected transform"),
        ({"k": 1, "weights": "eg", "cap": 0.5}, "expected cap >= 1"),
        ({"strategy": "threshold", "threshold": 9.0}, "none of 2 negatives qualifies"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        select(table([1.0, 2.0]), **options)


@pytest.mark.parametrize(
    ("weights", "scores", "message"),
    [
        ([1.0], [1.0, 2.0], "one shape"),
        ([], [], "n > 0"),
        ([1.0, 1.0], [1.0, float("nan")], "1 are not"),
        ([1.0, -1.0], [1.0, 2.0], "weights >= 0"),
        ([0.0, 0.0], [1.0, 2.0], "not all 0"),
    ],
)
def test_bad_weights_and_scores_are_named(weights, scores, message):
    with pytest.raises(ValueError, match=message):
        exponentiated_gradient(np.array(weights), np.array(scores))


def test_approximations_are_not_ranked_with_exact_scores():
    scores = table([3.0, 9.0, 2.0, np.nan, -1.0])
    scores.exact = np.array([True, False, True, False, True])
    chosen = select(scores, k=2)
    assert chosen.id.tolist() == ["n0", "n2"] and chosen.dropped_approximate == 2
    assert select(scores, k=2, approximate="keep", nonfinite="drop").id.tolist() == ["n1", "n0"]
    scores.exact = np.zeros(5, dtype=bool)
    chosen = select(scores, k=2, nonfinite="drop")
    assert chosen.id.tolist() == ["n1", "n0"] and chosen.dropped_approximate == 0
    with pytest.raises(ValueError, match='expected approximate "drop" or "keep"'):
        select(scores, k=2, approximate="some")

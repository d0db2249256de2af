"""Cheaper scorer modes: what they compute, what they promise of their error, and that the promise holds."""

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import u2a_fast
from u2a_fast.bench.rows import read_rows
from u2a_fast.influence import checks, lowrank, modes
from u2a_fast.influence.derivatives import DerivativePass
from u2a_fast.influence.layers import choose_layers
from u2a_fast.influence.ranks import CPU_UNITS, Profile, RankPlan, exact_units, plan_ranks
from u2a_fast.influence.topk import best, certify, recall_of_shortlist
from u2a_fast.store import Journal, read_scores, score_to_parquet, write_scores
from u2a_fast.store import journal as journal_module

RANK = 3


def truncated(v: torch.Tensor, rank: int = RANK) -> torch.Tensor:
    left, singular, right = torch.linalg.svd(v, full_matrices=False)
    return (left[:, :rank] * singular[:rank]) @ right[:rank]


def negatives(count: int) -> list[dict[str, object]]:
    return [{"id": f"n{i}", **e} for i, e in enumerate(tiny.examples(count, 9))]


def scorer(family: str = "llama", **options) -> u2a_fast.InfluenceScorer:
    objective = u2a_fast.SFT([{"example": e} for e in tiny.examples(6, 5)])
    return u2a_fast.InfluenceScorer(tiny.build(family), None, objective, parameters="all", **options)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "gemma2"])
def test_lowrank_is_exact_on_the_truncated_direction(family: str) -> None:
    model, batch = tiny.build(family), tiny.examples(5)
    embedding = model.get_input_embeddings().weight
    linear = {id(m.weight) for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")} - {id(embedding)}
    names = {name: p for name, p in model.named_parameters() if p is not embedding}
    directions = [{n: v for n, v in tiny.direction(model, seed).items() if n in names} for seed in (1, 2)]
    wanted = [{n: truncated(v) if id(names[n]) in linear else v for n, v in d.items()} for d in directions]
    got = u2a_fast.directional_derivatives(model, batch, directions, mode="lowrank", rank=RANK)
    for k in range(2):
        want = tiny.per_example(model, batch, wanted[k])
        # norms that round to float32 inside float64 models (Llama's family) leave their eps
        torch.testing.assert_close(got[k], want, rtol=2e-5, atol=2e-6 * want.abs().max().item())


def test_a_tied_head_is_truncated_and_its_embedding_is_not() -> None:
    model, batch = tiny.build("gpt2"), tiny.examples(5)
    name = "transformer.wte.weight"
    v = {name: tiny.direction(model)[name]}
    both, shortened = (tiny.per_example(model, batch, {name: x}) for x in (v[name], truncated(v[name])))
    untied = tiny.build("gpt2")
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    embedding = [tiny.per_example(untied, batch, {name: x}) for x in (v[name], truncated(v[name]))]
    got = u2a_fast.directional_derivatives(model, batch, v, mode="lowrank", rank=RANK)
    torch.testing.assert_close(got, shortened - embedding[1] + embedding[0], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(got, both, rtol=1e-3)


def test_matrices_that_factors_do_not_shorten_stay_exact() -> None:
    model, batch, v = tiny.build("gpt2"), tiny.examples(4), tiny.direction(tiny.build("gpt2"))
    exact = u2a_fast.directional_derivatives(model, batch, v)
    torch.testing.assert_close(u2a_fast.directional_derivatives(model, batch, v, mode="lowrank", rank=64), exact)
    v["transformer.h.0.mlp.c_fc.weight"][0, 0] = torch.nan
    assert u2a_fast.directional_derivatives(model, batch, v, mode="lowrank", rank=RANK).isnan().all()


def bounded(model, batch, v, rank: int):
    passes = DerivativePass(model, [v], approximate=partial(lowrank.truncate, ranks=rank, bounded=True))
    with passes.running():
        out = passes(batch)
    return out.derivatives[0].double(), out.bound[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exact_side", [1024, 4])
def test_the_bound_holds(family: str, dtype: torch.dtype, exact_side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "EXACT_SIDE", exact_side)
    model, batch = tiny.build(family, dtype), tiny.examples(12, longest=30)
    v = tiny.direction(model)
    exact = u2a_fast.directional_derivatives(model, batch, v).double()
    widths = []
    for rank in (1, 4, 12):
        approximate, bound = bounded(model, batch, v, rank)
        assert (bound >= (exact - approximate).abs()).all()
        widths.append(bound.mean())
    assert widths[0] > widths[1] > widths[2]


def test_the_bound_closes_where_nothing_is_left_out() -> None:
    model, batch = tiny.build("gpt2", torch.float32), tiny.examples(8)
    v = {n: truncated(x, 2) for n, x in tiny.direction(model).items() if n.endswith("c_fc.weight")}
    exact = u2a_fast.directional_derivatives(model, batch, v).double()
    approximate, bound = bounded(model, batch, v, 2)
    assert (bound >= (exact - approximate).abs()).all()
    assert (bound < 0.05 * exact.abs().max()).all()  # what rounding of 32-term products in float32 can explain


@pytest.mark.parametrize("exact_side", [1024, 4])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_spectral_norm_bound(shape: tuple[int, int], exact_side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "EXACT_SIDE", exact_side)
    e = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for matrix in (e, truncated(e, 1), 1e-20 * e):
        norm = float(torch.linalg.matrix_norm(matrix.double(), 2))
        assert norm <= lowrank.spectral_norm_bound(matrix) <= 40 ** (1 / 32) * norm * 1.001
    assert lowrank.spectral_norm_bound(0 * e) == 0


def test_randomized_svd_is_near_the_best_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "EXACT_SIDE", 4)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(60, 50, generator=generator) @ torch.diag(torch.arange(1.0, 51) ** -1.0)
    left, singular, right = lowrank._svd(v, 5, exact=True)
    lost = (v - (left * singular) @ right.mT).norm()
    assert lost <= 1.01 * torch.linalg.svdvals(v)[5:].norm()
    assert all(torch.equal(x, y) for x, y in zip((left, singular, right), lowrank._svd(v, 5, exact=True), strict=True))


def test_which_svd_is_randomized() -> None:
    v = torch.randn(90, 60, generator=torch.Generator().manual_seed(0))  # a flat spectrum, the worst for a sample
    best = torch.linalg.svd(v)[0]
    for rank, exact, is_exact in ((4, False, False), (4, True, True), (8, False, True)):  # 4 (rank + 8) against 60
        left, singular, right = lowrank._svd(v, rank, exact=exact)
        assert torch.allclose((left * best[:, :rank]).sum(0).abs(), torch.ones(rank), atol=1e-5) == is_exact
        assert (v - (left * singular) @ right.mT).norm() <= 1.02 * torch.linalg.svdvals(v)[rank:].norm()


values = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 0.5, 1.0, 3.0, float("nan"), float("inf"), float("-inf")])


@settings(max_examples=200, deadline=None)
@given(st.lists(values, min_size=1, max_size=150), st.integers(1, 12), st.integers(0, 10**6))
def test_certified_top_k_is_the_top_k(scores: list[float], k: int, seed: int) -> None:
    exact, rng = np.array(scores), np.random.default_rng(seed)
    bound = rng.choice([0.0, 0.4, 2.0], len(exact))
    approximate = np.where(np.isfinite(exact), exact + bound * rng.uniform(-1, 1, len(exact)), np.nan)
    order, found = certify(approximate, bound * (1 + 1e-12), lambda positions: exact[positions], k)
    np.testing.assert_array_equal(order, best(exact, k))
    np.testing.assert_array_equal(found.compressed(), exact[~np.ma.getmaskarray(found)])


def test_certificate_rescores_only_what_can_reach_the_top() -> None:
    exact = np.arange(1000.0)
    order, found = certify(exact + 0.5, np.full(1000, 1.0), lambda positions: exact[positions], 3)
    assert order.tolist() == [999, 998, 997]
    assert found.count() <= 6


def test_best_puts_nan_last_and_keeps_order_among_equals() -> None:
    scores = np.array([1.0, np.nan, 2.0, -np.inf, 2.0])
    assert best(scores, 9).tolist() == [2, 4, 0, 3, 1]


@pytest.mark.parametrize("k", [1, 5, 20, 31])
@pytest.mark.parametrize("loss", ["ga", "npo"])
def test_topk_equals_exact_scoring(k: int, loss: str) -> None:
    rows = [*negatives(14), *negatives(6)]
    rows = [{**row, "id": str(i)} for i, row in enumerate(rows)]  # six twins
    by_topk = scorer("gpt2", loss=loss).topk(rows, k, rank=RANK)
    exact = scorer("gpt2", loss=loss).score(rows)
    order = best(exact.score, k)
    np.testing.assert_allclose(by_topk.score, exact.score[order], rtol=1e-9)
    if k < len(rows):
        assert len(set(by_topk.id) ^ set(exact.id[order])) <= 2  # a twin for its twin, equal but for rounding
    assert by_topk.exact.all() and by_topk.report.certified
    assert k <= by_topk.report.rescored <= len(rows) or k > len(rows)


def test_topk_plans_its_ranks_or_scores_all() -> None:
    rows = negatives(300)
    found = scorer("gpt2").topk(rows, 3)
    exact = scorer("gpt2").score(rows)
    assert found.id.tolist() == exact.id[best(exact.score, 3)].tolist()
    plan = scorer("gpt2").plan_topk(rows, 3)
    assert (found.report.rescored < 300) == plan.pays == (plan.units < plan.exact)
    assert scorer("gpt2").topk(rows[:20], 3).report.note  # too few to plan for


def test_topk_scores_all_exactly_where_the_model_runs_forward_only() -> None:
    rows = negatives(300)
    model = tiny.build("llama")
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: 2 * out)
    objective = u2a_fast.SFT([{"example": e} for e in tiny.examples(6, 5)])
    hooked = u2a_fast.InfluenceScorer(model, None, objective, parameters="all")
    found, exact = hooked.topk(rows, 3), hooked.score(rows)
    assert found.id.tolist() == exact.id[best(exact.score, 3)].tolist()
    assert found.report.route == "forward" and "no bound: [capture]" in found.report.note


def test_topk_refuses() -> None:
    with pytest.raises(ValueError, match="k of at least 1"):
        scorer().topk(negatives(2), 0)
    with pytest.raises(ValueError, match="expected float32 or float64 for a certificate"):
        scorer(dtype=torch.bfloat16).topk(negatives(2), 1)
    for options in ({"mode": "fast"}, {"fraction": 0.0}, {"rank": 0}):
        with pytest.raises(ValueError, match="expected a"):
            scorer(**options)


def test_units_of_an_exact_score_are_those_measured() -> None:
    """The constants of the rank plan are within a tenth of the committed rows that they quote."""
    rows = [row for row in read_rows(Path(__file__).parents[1] / "benchmarks" / "results") if row["device"] == "cpu"]
    units = [row["units"] for row in rows if row["benchmark"] == "routes" and row["case"] in ("hh", "llama")]
    assert units
    for route, constant in CPU_UNITS.items():
        for found in units:
            assert abs(found[f"{route} fp32"] / constant - 1) < 0.1


def test_ranks_go_where_the_bound_falls_most() -> None:
    falling = np.array([[8.0] * 10, [0.01] * 10])
    flat = np.array([[0.02] * 10, [0.02] * 10])
    profiles = {"steep": Profile((100, 100), (4, 16), falling), "flat": Profile((100, 100), (4, 16), flat)}
    plan = plan_ranks(profiles, np.arange(10.0), 0.1)
    assert plan.ranks == {"steep": 16, "flat": 4}
    assert plan.rescored == 0.1 and plan.units == pytest.approx(2 + 200 * 20 / 20000 + 0.3)
    assert plan.pays and not plan_ranks(profiles, np.arange(10.0), 0.1, exact_units("forward", "cpu")).pays
    assert exact_units("forward", "cuda") == 3 > exact_units("reverse", "cpu")


def test_shortlist_is_exact_where_it_says() -> None:
    rows = negatives(60)
    exact, low = scorer("gpt2").score(rows), scorer("gpt2", mode="lowrank", rank=RANK).score(rows)
    found = scorer("gpt2", mode="shortlist", rank=RANK, fraction=0.2).score(rows)
    np.testing.assert_allclose(found.score, exact.score, rtol=1e-9)  # the sample takes all the others of so few
    assert found.exact.all() and found.report.rescored == 60
    assert not low.exact.any() and 0 < low.report.energy < 1
    listed = best(low.score, 12)
    threshold = np.median(exact.score[listed])
    assert found.report.recall == pytest.approx(6 / (exact.score >= threshold).sum())


def test_shortlist_flags_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("u2a_fast.influence.topk._SAMPLE", 10)
    rows = negatives(60)
    low = scorer("gpt2", mode="lowrank", rank=RANK).score(rows)
    found = scorer("gpt2", mode="shortlist", rank=RANK, fraction=0.2).score(rows)
    assert found.exact.sum() == found.report.rescored == 22 and found.exact[best(low.score, 12)].all()
    np.testing.assert_array_equal(found.score[~found.exact], low.score[~found.exact])
    low_end, high_end = found.report.recall_interval
    assert 0 <= low_end <= found.report.recall <= high_end <= 1


def test_recall_of_a_shortlist() -> None:
    listed = np.arange(10.0, 20.0)  # 5 above the median
    recall, (low, high) = recall_of_shortlist(listed, np.array([0.0] * 95 + [30.0] * 5), 1000)
    assert recall == pytest.approx(5 / (5 + 50)) and low < recall < high
    assert recall_of_shortlist(listed, np.zeros(0), 0) == (1.0, (1.0, 1.0))
    assert recall_of_shortlist(listed, np.zeros(40), 40) == (1.0, (1.0, 1.0))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers(family: str) -> None:
    rows = negatives(12)
    exact = scorer(family, mode="reverse").score(rows)  # forward differs by the float32 of Llama's norms
    whole = scorer(family, mode="layers", fraction=1.0).score(rows)
    np.testing.assert_allclose(whole.score, exact.score, rtol=1e-6)
    assert whole.report.layers == (0, 1) and whole.report.share == pytest.approx(1)
    top = scorer(family, mode="layers", fraction=0.5).score(rows)
    assert top.report.layers == (1,) and not top.exact.any()
    model = tiny.build(family)
    v = scorer(family).direction()
    below = {n for n in v if ".0." in n or n.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight"))}
    want = -u2a_fast.directional_derivatives(
        model, rows, {n: x for n, x in v.items() if n not in below}, mode="reverse"
    )
    if family == "gpt2":  # the tied weight still counts as the head's
        hidden = {n: x for n, x in v.items() if n == "transformer.wte.weight"}
        untied = tiny.build(family)
        untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
        want -= tiny.per_example(untied, rows, {"lm_head.weight": hidden["transformer.wte.weight"]})
    np.testing.assert_allclose(top.score, want, rtol=1e-6)


def test_layers_by_share_under_a_cost() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4, 50))
    parts = {
        "embed": noise[0],
        "h.0.a": 3 * noise[1],
        "h.1.a": 0.1 * noise[2],
        "h.2.a": noise[3],
        "h.3.a": 0 * noise[0],
    }
    assert choose_layers(parts, 1.0).blocks == (0, 1, 2)  # block 3 adds nothing
    assert choose_layers(parts, 0.75).blocks == (0, 2)
    assert choose_layers(parts, 0.375).blocks == (2,)
    assert choose_layers(parts, 0.01).blocks == (3,)
    with pytest.raises(ValueError, match="blocks that their modules' names number"):
        choose_layers({"norm": noise[0]}, 0.5)


@pytest.mark.parametrize("mode", ["lowrank", "layers"])
def test_resuming_gives_the_same_bytes(mode: str, tmp_path) -> None:
    rows = negatives(20)
    whole = score_to_parquet(scorer(mode=mode, rank=RANK), rows, tmp_path / "whole", window=8)
    broken = scorer(mode=mode, rank=RANK)
    once = broken.score

    def stop_in_the_third_window(window):
        if window[0]["id"] == "n16":
            raise KeyboardInterrupt
        return once(window)

    broken.score = stop_in_the_third_window
    with pytest.raises(KeyboardInterrupt):
        score_to_parquet(broken, rows, tmp_path / "broken", window=8)
    resumed = score_to_parquet(scorer(mode=mode, rank=RANK), rows, tmp_path / "broken", window=8)
    assert resumed.resumed_rows == 16 and resumed.path.read_bytes() == whole.path.read_bytes()
    assert not read_scores(tmp_path / "broken")["exact"].any() and resumed.report.mode == mode


class Interruption(Exception):
    pass


WINDOW = 24
RANKINGS = {
    "shortlist": ["low-rank pass", "rescoring"],
    "top k": ["low-rank pass", "rescoring"],
    "planned top k": ["sample", "profiles", "low-rank pass", "rescoring"],
    "exact top k": ["sample", "profiles", "exact pass"],
    "16 bits": ["low-rank pass", "rescoring", "float32 sample"],
}


class Ranking:
    """Runs that rank 300 negatives, what they ran, and where they are to stop."""

    def __init__(self, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.how, self.batches, self.most, self.told, self.stop = how, 0, 0, [], None
        run_batches, profiles = modes.run_batches, modes.profile_ranks

        def counted(*arguments):
            for i, found in enumerate(run_batches(*arguments)):
                self.batches, self.most = self.batches + 1, max(self.most, i + 1)
                yield found

        def profiled(*arguments):
            self.tell("profiles", 1, 1)
            return profiles(*arguments)

        def planned(found, *_):
            uneven = {name: 2 + i % 2 for i, name in enumerate(found)}
            return RankPlan(uneven, 3.5 if how == "exact top k" else 2.5, 0.1)

        monkeypatch.setattr(modes, "run_batches", counted)
        monkeypatch.setattr(modes, "profile_ranks", profiled)
        monkeypatch.setattr(modes, "plan_ranks", planned)
        monkeypatch.setattr(checks, "FLOAT32_SHARE", 4)  # a sample of more than one window

    def tell(self, stage: str, done: int, total: int) -> None:
        self.told.append((stage, done, total))
        if (stage, sum(stage == told for told, *_ in self.told)) == self.stop:
            raise Interruption

    def __call__(self, out: Path, stop: tuple[str, int] | None = None) -> tuple[bytes, object, int]:
        """The bytes of the scores, their report, how many rows were read; stops at an event of a stage."""
        self.batches, self.told, self.stop = 0, [], stop
        journal = Journal(out, {"how": self.how}, window=WINDOW)
        options = {"on_progress": self.tell, "journal": journal}
        if self.how in ("shortlist", "16 bits"):
            dtype = torch.bfloat16 if self.how == "16 bits" else None
            listing = scorer("gpt2", mode="shortlist", rank=RANK, token_budget=100, dtype=dtype)
            scores = listing.score(negatives(300), **options)
        else:
            rank = RANK if self.how == "top k" else None
            scores = scorer("gpt2", token_budget=100).topk(negatives(300), 20, rank=rank, **options)
        out.mkdir(exist_ok=True)
        summary = write_scores(out / "scores.parquet", scores, resumed_rows=journal.resumed_rows)
        journal.remove()
        return summary.path.read_bytes(), scores.report, summary.resumed_rows


@pytest.mark.parametrize("how", RANKINGS)
def test_a_ranking_resumes_in_every_stage_to_the_same_bytes(
    how: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranking = Ranking(how, monkeypatch)
    whole = ranking(tmp_path / "whole")
    all_batches, events = ranking.batches, Counter(stage for stage, *_ in ranking.told)
    assert list(events) == RANKINGS[how] and whole[2] == 0
    assert 2 <= ranking.most < all_batches / 5
    for stage, count in events.items():
        out = tmp_path / stage
        with pytest.raises(Interruption):
            ranking(out, (stage, count // 2 + 1))
        before = ranking.batches
        kept = len(list((out / "parts").glob(f"{stage.replace(' ', '-')}-*.parquet")))
        *found, read = ranking(out)
        assert tuple(found) == whole[:2] and read > 0, stage
        extra = before + ranking.batches - all_batches
        assert 0 <= extra <= ranking.most, f"{stage}: one window at most runs twice"
        if kept:
            first = next(told for told in ranking.told if told[0] == stage)
            assert first[1] == WINDOW, f"{stage}: windows that are there move the bar"
        assert not (out / "parts").exists()


def test_a_kept_plan_is_not_made_again(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of one pass need the same ranks, and the plan costs more than its sample's scores."""
    ranking = Ranking("planned top k", monkeypatch)
    whole = ranking(tmp_path / "whole")
    with pytest.raises(Interruption):
        ranking(tmp_path / "out", ("low-rank pass", 20))
    monkeypatch.setattr(modes, "plan_ranks", lambda *_: RankPlan({}, 3.5, 1.0))
    assert ranking(tmp_path / "out")[:2] == whole[:2]
    assert {stage for stage, *_ in ranking.told} == {"low-rank pass", "rescoring"}


def test_a_full_disk_costs_the_window_that_was_to_be_written(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranking = Ranking("top k", monkeypatch)
    whole = ranking(tmp_path / "whole")
    write, written = journal_module.write_atomically, 0

    def full(path: Path, fill) -> None:
        nonlocal written
        written += 1
        if written == 5:
            path.with_name(f".{path.name}.tmp").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(path, fill)

    monkeypatch.setattr(journal_module, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        ranking(tmp_path / "out")
    assert ranking(tmp_path / "out") == (*whole[:2], 4 * WINDOW)


def test_a_journal_changes_nothing_but_what_shares_a_batch(tmp_path) -> None:
    rows = negatives(60)
    options = {"mode": "shortlist", "rank": RANK, "batch_invariant": True}
    plain = scorer("gpt2", **options).score(rows)
    kept = scorer("gpt2", **options).score(rows, journal=Journal(tmp_path, window=7))
    np.testing.assert_array_equal(kept.score, plain.score)
    np.testing.assert_array_equal(kept.nll, plain.nll)
    assert kept.report == plain.report


def test_a_shortlist_is_not_scored_by_windows(tmp_path) -> None:
    with pytest.raises(ValueError, match="ranks all negatives at once"):
        score_to_parquet(scorer(mode="shortlist"), negatives(4), tmp_path)


def test_16_bit_scores_are_held_against_float32_on_a_sample() -> None:
    half = scorer(dtype=torch.bfloat16)
    first = half.score(negatives(20)).report
    assert first is not None and first.float32_spearman is not None and 0.9 < first.float32_spearman <= 1
    assert (first.route, first.mode) == ("forward", "exact") and "one direction" in str(first.reason)
    assert half.score(negatives(9)).report.float32_spearman == first.float32_spearman, "measured once"
    assert scorer().score(negatives(9)).report.float32_spearman is None
    few = scorer(dtype=torch.bfloat16).score(negatives(3)).report
    assert few.float32_spearman is None and "fewer than 8 negatives" in str(few.note)


@pytest.mark.parametrize("k", [2, 20])
def test_16_bit_rankings_are_held_against_float32_too(tmp_path, k: int) -> None:
    half, batch = scorer(dtype=torch.bfloat16), negatives(60)
    index = u2a_fast.GradientIndex.build(half.model, batch, tmp_path, dim=64, parameters="all")
    for found in (half.topk(batch, k, certified=False), half.topk_by_index(batch, index, k)):
        assert found.report.float32_spearman is not None and 0.9 < found.report.float32_spearman <= 1
        assert len(found) == k and found.report.note is None
    few = half.topk(batch[:5], 2, certified=False).report
    assert few.float32_spearman is None and "fewer than 8 negatives" in str(few.note)
    assert scorer().topk(batch, k, certified=False).report.float32_spearman is None


def test_no_memory_for_float32_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    half = scorer(dtype=torch.bfloat16)
    evaluate = modes.Run.evaluate

    def small(self: modes.Run, passes, positions=None, *stage, **rest):
        if passes.dtype == torch.float32:
            raise torch.OutOfMemoryError("full")
        return evaluate(self, passes, positions, *stage, **rest)

    monkeypatch.setattr(modes.Run, "evaluate", small)
    found = half.score(negatives(9))
    assert found.report.float32_spearman is None and "float32" in found.report.note and np.isfinite(found.score).all()

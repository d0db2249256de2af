"""With ``batch_invariant`` an example has the same bits whatever is scored beside it, and in what order."""

import pytest
import tiny_models as tiny
import torch

import u2a_fast
from u2a_fast import DPO, InfluenceScorer
from u2a_fast.influence import checks
from u2a_fast.influence.derivatives import resolve_token_budget

Rows = list[dict[str, list[int]]]


def examples() -> Rows:
    """Ragged examples, some of which continue one prompt, and one twice."""
    prompt = [5, 9, 4, 17, 8, 3]
    answers = [[7, 11, 3], [6], [20, 21, 22, 23]]
    shared = [{"input_ids": prompt + own, "labels": [-100] * len(prompt) + own} for own in answers]
    return [*tiny.examples(5, longest=40), *shared, shared[0]]


@pytest.mark.parametrize("mode", ["forward", "reverse", "lowrank"])
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("gemma2", torch.bfloat16)])
def test_companions_order_and_budget_change_no_bit(family: str, dtype: torch.dtype, mode: str) -> None:
    model, batch = tiny.build(family).float(), examples()
    v = {name: d.float() for name, d in tiny.direction(model).items()}

    def derivatives(rows: Rows, token_budget: int | None = None) -> torch.Tensor:
        return u2a_fast.directional_derivatives(
            model, rows, v, mode=mode, dtype=dtype, token_budget=token_budget, batch_invariant=True
        )

    want = derivatives(batch)
    assert want.isfinite().all() and want[5] == want[-1]
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(3))
    assert torch.equal(derivatives([batch[i] for i in order], 7), want[order])
    assert torch.equal(derivatives(batch[3:7], 4096), want[3:7])
    assert torch.equal(derivatives(batch[4:5]), want[4:5])


def test_every_example_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it they run together, or the test above would hold of anything."""
    model, batch = tiny.build("llama"), examples()
    sizes: list[int] = []
    forward = type(model.model).forward

    def count(self, input_ids, **rest):
        sizes.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(type(model.model), "forward", count)
    longest = max(len(row["input_ids"]) for row in batch)
    for invariant in (False, True):
        sizes.clear()
        u2a_fast.directional_derivatives(model, batch, {}, mode="reverse", batch_invariant=invariant)
        assert (max(sizes) < longest) == invariant
        assert (len(sizes) >= len(batch)) == invariant


@pytest.mark.parametrize("mode", ["auto", "layers"])
def test_scores_change_no_bit(mode: str) -> None:
    model, batch = tiny.build("llama").float(), examples()
    rows = tiny.examples(4, seed=5)
    pairs = [{"chosen": rows[i], "rejected": rows[i + 1]} for i in (0, 2)]

    def scores(negatives: Rows, token_budget: int | None) -> list[float]:
        scorer = InfluenceScorer(
            model, None, DPO(pairs), mode=mode, token_budget=token_budget, batch_invariant=True, dtype=torch.bfloat16
        )
        return scorer.score(negatives).score.tolist()

    want = scores(batch, None)
    assert scores(batch, 30) == want
    if mode == "auto":  # layers are chosen by what is scored
        assert scores(batch[::-1], 64) == want[::-1]
        assert scores(batch[2:7], None) == want[2:7]


def test_the_budget_of_one_example_is_stated_once() -> None:
    cpu = torch.device("cpu")
    assert resolve_token_budget(4096, cpu, batch_invariant=True) == 1
    assert resolve_token_budget(4096, cpu) == 4096


@pytest.mark.parametrize("mode", ["auto", "lowrank", "shortlist", "layers"])
def test_its_cost_is_timed_and_changes_no_bit(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.build("llama").float(), tiny.examples(30)
    rows = tiny.examples(4, seed=5)
    pairs = [{"chosen": rows[i], "rejected": rows[i + 1]} for i in (0, 2)]

    def make(invariant: bool = True) -> InfluenceScorer:
        return InfluenceScorer(model, None, DPO(pairs), mode=mode, rank=2, batch_invariant=invariant)

    timed = []
    run_batches = checks.run_batches
    monkeypatch.setattr(checks, "run_batches", lambda *a: timed.append((len(a[1]), a[2].tokens)) or run_batches(*a))
    first = make()
    found = first.score(batch)
    assert found.report.batch_invariant_cost > 0 and "batch_invariant_cost" in found.report.to_dict()
    assert timed == [(8, 1), (8, 2048)] * 3, "few negatives, both ways in turn"
    assert first.score(batch).score.tolist() == found.score.tolist() and len(timed) == 6, "once a scorer"
    assert make(False).score(batch).report.batch_invariant_cost is None and len(timed) == 6
    monkeypatch.setattr(checks, "invariance_cost", lambda *_: 2.0)
    untimed = make().score(batch)
    assert untimed.score.tolist() == found.score.tolist() and untimed.report.batch_invariant_cost == 2.0
    if mode == "auto":
        assert make().score([]).report.batch_invariant_cost is None
        assert make().topk(batch, 3).report.batch_invariant_cost == 2.0

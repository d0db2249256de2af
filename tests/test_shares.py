"""Tokens' and modules' shares of scores sum to them, and are those of the derivatives with sign and slope."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_models as tiny
import torch

import u2a_fast
from u2a_fast.store import Journal, read_scores, score_to_parquet


@pytest.fixture
def true_float64() -> Iterator[None]:
    with tiny.true_float64():
        yield


def negatives(count: int) -> list[dict[str, object]]:
    return [{"id": f"n{i}", **e} for i, e in enumerate(tiny.examples(count, 9))]


def scorer(family: str = "llama", **options) -> u2a_fast.InfluenceScorer:
    objective = u2a_fast.SFT([{"example": e} for e in tiny.examples(6, 5)])
    return u2a_fast.InfluenceScorer(tiny.build(family), None, objective, parameters="all", **options)


def close(got: np.ndarray, want: np.ndarray) -> bool:
    return bool(np.abs(got - want).max() <= 1e-10 * np.abs(want).max())


@pytest.mark.usefixtures("true_float64")
@pytest.mark.parametrize("mode", ["auto", "reverse"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_shares_sum_to_the_scores(family: str, reduction: str, mode: str) -> None:
    batch = negatives(6)
    batch.append({**batch[2], "id": "again"})  # a prompt that is shared
    options = {"curvature": "fisher", "loss": "npo", "reduction": reduction, "mode": mode, "token_budget": 40}
    made = scorer(family, **options)
    moved = made.score(batch).nll + np.arange(len(batch))  # so that NPO's slope is every negative's own
    whole = made.score(batch, nll_reference=moved)
    tokens = made.token_scores(batch, nll_reference=moved)
    modules = made.module_scores(batch, nll_reference=moved)
    assert [len(row) for row in tokens] == whole.tokens.tolist() and all(r.dtype == torch.float64 for r in tokens)
    assert close(np.array([row.sum().item() for row in tokens]), whole.score)
    assert close(torch.stack(list(modules.values())).sum(0).numpy(), whole.score)
    slope = u2a_fast.losses.unlearning_slope("npo", torch.from_numpy(whole.nll), torch.from_numpy(moved), 0.1)
    assert len(set(slope.tolist())) > 2
    parts = u2a_fast.module_derivatives(made.model, batch, made.direction(), reduction=reduction)
    assert list(modules) == list(parts)
    for path, part in parts.items():
        assert np.abs((slope * part - modules[path]).numpy()).max() <= 1e-10 * np.abs(whole.score).max(), path
    own = u2a_fast.token_derivatives(made.model, batch, made.direction())
    for i, row in enumerate(own):
        assert close(tokens[i].numpy(), (slope[i] * row / (len(row) if reduction == "mean" else 1)).numpy())


@pytest.mark.parametrize("mode", ["auto", "reverse"])
def test_asking_for_shares_changes_no_bit(mode: str) -> None:
    batch = negatives(7)
    plain = scorer(mode=mode, dtype=torch.float32).score(batch)
    made = scorer(mode=mode, dtype=torch.float32).score(batch, per_token=True, per_module=True)
    assert made.score.tolist() == plain.score.tolist() and plain.token_scores is plain.module_scores is None
    np.testing.assert_allclose([row.sum() for row in made.token_scores], plain.score, rtol=1e-4)
    np.testing.assert_allclose(sum(made.module_scores.values()), plain.score, rtol=1e-4, atol=1e-6)
    for item, ids in zip(batch, made.token_ids, strict=True):
        assert ids.tolist() == [y for y in item["labels"][1:] if y != -100]


def test_some_parameters_and_no_negatives() -> None:
    made = scorer()
    made.names = [name for name in made.names if "q_proj" in name]
    assert made.token_scores([]) == [] and all(len(part) == 0 for part in made.module_scores([]).values())
    assert [path.rpartition(".")[2] for path in made.module_scores(negatives(2))] == ["q_proj"] * 2


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for shares, got 'lowrank'"):
        scorer(mode="lowrank").score(negatives(2), per_token=True)
    for mode in ("lowrank", "shortlist", "layers"):
        with pytest.raises(ValueError, match="expected a mode out of"):
            scorer(mode=mode).module_scores(negatives(2))
    with pytest.raises(ValueError, match="expected no journal with shares"):
        scorer().score(negatives(2), journal=Journal(tmp_path), per_module=True)


def test_shares_are_written_with_their_windows_and_resume(tmp_path: Path) -> None:
    batch, options = negatives(11), {"window": 4, "per_token": True, "per_module": True}
    score_to_parquet(scorer(), batch, tmp_path / "whole", **options)

    class Falls:
        def __init__(self) -> None:
            self.inner, self.calls = scorer(), 0

        def score(self, rows, **rest):
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return self.inner.score(rows, **rest)

    with pytest.raises(KeyboardInterrupt):
        score_to_parquet(Falls(), batch, tmp_path / "out", **options)
    with pytest.raises(FileExistsError, match=r"holds shares \['per_module', 'per_token'\], not \['per_token'\]"):
        score_to_parquet(scorer(), batch, tmp_path / "out", **{**options, "per_module": False})
    assert score_to_parquet(scorer(), batch, tmp_path / "out", **options).resumed_rows == 8
    whole, out = (tmp_path / name / "scores.parquet" for name in ("whole", "out"))
    assert whole.read_bytes() == out.read_bytes()
    table = pq.read_table(out)
    assert table.column_names[-3:] == ["token_ids", "token_scores", "module_scores"]
    rows = table.to_pylist()
    np.testing.assert_allclose([sum(row["token_scores"]) for row in rows], [row["score"] for row in rows], rtol=1e-6)
    np.testing.assert_allclose(
        [sum(row["module_scores"].values()) for row in rows], [row["score"] for row in rows], rtol=1e-4, atol=1e-6
    )
    assert "lm_head" in rows[0]["module_scores"] and len(rows[0]["token_ids"]) == rows[0]["tokens"]
    assert set(read_scores(out)) == {"id", "score", "nll", "tokens", "exact", "fits"}

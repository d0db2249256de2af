"""The loop: what it writes, that it stops, that it resumes, on tiny float64 models."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build, examples, own_nll
from torch import Tensor, nn

from u2a_fast import DPO, SFT, InfluenceScorer
from u2a_fast.selection import exponentiated_gradient
from u2a_fast.unlearning import AlignConfig, UnlearnConfig, align, loop

NEGATIVES = [{**e, "id": f"n{i}"} for i, e in enumerate(examples(17))]
PAIRS = [{"chosen": c, "rejected": r} for c, r in zip(examples(10, seed=3), examples(10, seed=4), strict=True)]
STEPS = UnlearnConfig(learning_rate=1e-3, batch_size=4)
CONFIG = AlignConfig(rounds=3, k=8, patience=3, unlearn=STEPS)
TIGHT = 1e-9  # relative; float64 through a whole model in other batches, 1e-12 at most, with room for depth


@pytest.fixture(autouse=True)
def few_threads() -> None:
    torch.set_num_threads(1)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def columns(path: Path) -> dict[str, list]:
    return pq.read_table(path).to_pydict()


def test_rounds_score_select_unlearn_and_leave_all_on_disk(tmp_path: Path) -> None:
    model = build("llama")
    result = align(model, None, NEGATIVES, DPO(PAIRS), config=CONFIG, output_dir=tmp_path, retain=examples(3, seed=9))
    assert len(result.rounds) == 3 and result.stopped == "rounds"
    assert json.loads((tmp_path / "metrics.json").read_text()) == result.rounds
    weights: dict[str, float] = {}
    for r, metrics in enumerate(result.rounds):
        folder = tmp_path / f"round-{r:02d}"
        assert json.loads((folder / "metrics.json").read_text()) == metrics
        scores, chosen = columns(folder / "scores.parquet"), columns(folder / "selection.parquet")
        assert scores["id"] == [row["id"] for row in NEGATIVES]
        by_id = dict(zip(scores["id"], scores["score"], strict=True))
        assert chosen["score"] == [by_id[i] for i in chosen["id"]] and min(chosen["score"]) > 0
        before = np.array([weights.get(i, 1.0) for i in chosen["id"]])
        assert chosen["weight"] == exponentiated_gradient(before, np.array(chosen["score"])).weight.tolist()
        assert np.mean(chosen["weight"]) == pytest.approx(1)
        weights = dict(zip(chosen["id"], chosen["weight"], strict=True))
        # scored at the parameters of now, not at the original's
        assert np.mean(scores["nll"]) == pytest.approx(metrics["nll_negatives_before"], rel=TIGHT)
        assert metrics["nll_selected"] > metrics["nll_selected_before"]
    for a, b in zip(result.rounds, result.rounds[1:], strict=False):
        for key in ("preference_loss_train", "preference_loss_heldout", "nll_negatives", "nll_retain"):
            assert a[key] == b[f"{key}_before"]
    first = result.rounds[0]
    assert first["preference_loss_heldout_before"] == pytest.approx(np.log(2), rel=TIGHT)
    assert first["preference_loss_train"] < first["preference_loss_train_before"]
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert same(saved, parameters(model))


def test_the_proximal_center_and_the_references_stay_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = build("llama"), []
    original = parameters(model)
    score, train = InfluenceScorer.score, loop.train

    def spy_score(self: InfluenceScorer, rows: Any, *, nll_reference: Any = None) -> Any:
        seen.append(nll_reference)
        return score(self, rows, nll_reference=nll_reference)

    def spy_train(model: nn.Module, rows: Any, *args: Any, reference: Any, nll_reference: Any, **kwargs: Any) -> Any:
        assert same(original, reference.values)
        expected = [nll_at_start[row["id"]] for row in rows]
        assert nll_reference == pytest.approx(expected, rel=TIGHT)
        return train(model, rows, *args, reference=reference, nll_reference=nll_reference, **kwargs)

    nll_at_start = {row["id"]: own_nll(model, row).item() for row in NEGATIVES}
    monkeypatch.setattr(InfluenceScorer, "score", spy_score)
    monkeypatch.setattr(loop, "train", spy_train)
    monkeypatch.setattr(loop, "_WINDOW", 5)
    config = replace(CONFIG, rounds=2, unlearn=replace(STEPS, loss="npo", npo_beta=0.5))
    align(model, None, NEGATIVES, DPO(PAIRS), config=config, output_dir=tmp_path)
    assert seen[:4] == [None] * 4
    assert sum(seen[4:], []) == pytest.approx(list(nll_at_start.values()), rel=TIGHT)


@pytest.mark.parametrize("curvature", ["identity", "fisher"])
def test_every_round_scores_with_the_direction_of_its_own_parameters(
    curvature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring_rows, _ = DPO(PAIRS).prepare(build("llama")).split(CONFIG.heldout_fraction, CONFIG.seed)
    seeds, train = [], loop.train

    def spy(model: nn.Module, *args: Any, config: UnlearnConfig, **kwargs: Any) -> Any:
        fresh = InfluenceScorer(model, None, scoring_rows, curvature).score(NEGATIVES)
        stored = columns(tmp_path / f"round-{len(seeds):02d}" / "scores.parquet")["score"]
        np.testing.assert_allclose(stored, fresh.score, rtol=TIGHT, atol=TIGHT * np.abs(fresh.score).max())
        seeds.append(config.seed)
        return train(model, *args, config=config, **kwargs)

    monkeypatch.setattr(loop, "train", spy)
    config = replace(CONFIG, curvature=curvature, unlearn=replace(STEPS, seed=40))
    align(build("llama"), None, NEGATIVES, DPO(PAIRS), config=config, output_dir=tmp_path)
    assert seeds == [40, 41, 42]


def test_windows_do_not_change_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, rounds=1)
    align(build("llama"), None, NEGATIVES, DPO(PAIRS), config=config, output_dir=tmp_path / "one")
    monkeypatch.setattr(loop, "_WINDOW", 5)
    unnamed = [{key: row[key] for key in ("input_ids", "labels")} for row in NEGATIVES]
    align(build("llama"), None, unnamed, DPO(PAIRS), config=config, output_dir=tmp_path / "many")
    one, many = (columns(tmp_path / run / "round-00" / "scores.parquet") for run in ("one", "many"))
    assert many["id"] == [str(i) for i in range(17)]
    np.testing.assert_allclose(many["score"], one["score"], rtol=TIGHT)


def test_early_stop_fires_when_held_out_preferences_suffer_and_gives_the_original_back(tmp_path: Path) -> None:
    # held out: the same pairs with chosen and rejected exchanged, so that whatever helps the one hurts the other
    swapped = DPO([{"chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS])
    model = build("llama")
    original = parameters(model)
    for patience, rounds in ((1, 1), (2, 2)):
        out = tmp_path / str(patience)
        config = replace(CONFIG, rounds=4, patience=patience)
        result = align(model, None, NEGATIVES, DPO(PAIRS), config=config, heldout=swapped, output_dir=out)
        assert (len(result.rounds), result.best_round, result.stopped) == (rounds, -1, "early stop")
        assert result.rounds[0]["preference_loss_heldout"] > result.rounds[0]["preference_loss_heldout_before"]
        assert same(parameters(model), original)


def test_the_best_rounds_parameters_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # two measurements a round, before and after
    script: Iterator[float] = iter([0.7, 0.6, 0.6, 0.5, 0.5, 0.55, 0.55, 0.52])
    ends: list[dict[str, Tensor]] = []
    measured = loop._Loop.preference_losses

    def scripted(self: Any) -> dict[str, float]:
        ends.append(parameters(self.model))
        return {**measured(self), "preference_loss_heldout": next(script)}

    monkeypatch.setattr(loop._Loop, "preference_losses", scripted)
    model = build("llama")
    config = replace(CONFIG, rounds=6, patience=2)
    result = align(model, None, NEGATIVES, DPO(PAIRS), config=config, output_dir=tmp_path)
    assert (len(result.rounds), result.best_round, result.stopped) == (4, 1, "early stop")
    assert same(parameters(model), ends[3]) and not same(ends[3], ends[7])
    kept = sorted(path.parent.name for path in tmp_path.glob("round-*/parameters.safetensors"))
    assert kept == ["round-01", "round-03"]


def test_a_preference_loss_that_is_not_finite_ends_with_a_clear_error(tmp_path: Path) -> None:
    broken = DPO(PAIRS).prepare(build("llama"))
    assert broken.reference is not None
    broken.reference[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="expected finite preference losses"):
        align(build("llama"), None, NEGATIVES, DPO(PAIRS), heldout=broken, config=CONFIG, output_dir=tmp_path)


def test_no_round_where_unlearning_helps_nothing(tmp_path: Path) -> None:
    # the objective is to keep the negatives
    model = build("llama")
    original = parameters(model)
    keep = SFT([{"example": row} for row in NEGATIVES])
    result = align(model, None, NEGATIVES[:2], keep, heldout=keep, config=CONFIG, output_dir=tmp_path)
    scores = columns(tmp_path / "round-00" / "scores.parquet")["score"]
    assert max(scores) < 0
    assert (result.rounds, result.best_round, result.stopped) == ([], -1, "no gain")
    assert same(parameters(model), original) and (tmp_path / "model" / "model.safetensors").exists()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import test_align as t
from pathlib import Path
import torch

torch.set_num_threads(1)

def die(number, stage, done, total):
    if (number, stage, done) == (1, "unlearn", 1):
        os.kill(os.getpid(), signal.SIGKILL)

out = Path(sys.argv[1])
t.align(t.build("gpt2"), None, t.NEGATIVES, t.DPO(t.PAIRS), config=t.CONFIG, output_dir=out, on_progress=die)
"""


def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    # gpt2 has dropout, so random states count too
    whole = build("gpt2")
    result = align(whole, None, NEGATIVES, DPO(PAIRS), config=CONFIG, output_dir=tmp_path / "whole")
    here = Path(__file__).parent
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "cut"), str(here)], capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-2000:]
    assert (tmp_path / "cut" / "round-01" / "selection.parquet").exists() and not (tmp_path / "cut" / "model").exists()
    again = build("gpt2")
    rounds: list[int] = []
    resumed = align(
        again,
        None,
        NEGATIVES,
        DPO(PAIRS),
        config=CONFIG,
        output_dir=tmp_path / "cut",
        on_progress=lambda number, *_: rounds.append(number),
    )
    assert set(rounds) == {1, 2}
    assert resumed.rounds == result.rounds
    assert same(parameters(again), parameters(whole))
    for r in range(3):
        for name in ("scores.parquet", "selection.parquet"):
            a, b = (columns(tmp_path / run / f"round-{r:02d}" / name) for run in ("whole", "cut"))
            assert a == b


def test_a_finished_run_gives_its_result_again_and_another_run_is_refused(tmp_path: Path) -> None:
    config = replace(CONFIG, rounds=1)
    first, again = build("llama"), build("llama")
    result = align(first, None, NEGATIVES, DPO(PAIRS), config=config, output_dir=tmp_path)
    assert align(again, None, NEGATIVES, DPO(PAIRS), config=config, output_dir=tmp_path) == result
    assert same(parameters(first), parameters(again))
    for message, arguments in (
        ("another config", (build("llama"), None, NEGATIVES, DPO(PAIRS), replace(config, k=2))),
        ("another model", (again, None, NEGATIVES, DPO(PAIRS).prepare(build("llama")), config)),
        ("another negatives", (build("llama"), None, NEGATIVES[1:], DPO(PAIRS), config)),
        ("another held-out objective, objective", (build("llama"), None, NEGATIVES, DPO(PAIRS, beta=0.2), config)),
    ):
        model, tokenizer, negatives, objective, changed = arguments
        with pytest.raises(ValueError, match=message):
            align(model, tokenizer, negatives, objective, config=changed, output_dir=tmp_path)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="iterated more than once"):
        align(build("llama"), None, iter(NEGATIVES), DPO(PAIRS), output_dir=tmp_path)
    for options, message in (
        ({"rounds": 0}, "expected rounds >= 1"),
        ({"strategy": "all"}, "expected strategy out of"),
        ({"heldout_fraction": 1.0}, "0 < heldout_fraction < 1"),
    ):
        with pytest.raises(ValueError, match=message):
            AlignConfig(**options)

"""The embedded default: its corpus, its bookkeeping, and a small run that must show what the demo claims."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from u2a_fast.data import read_negatives
from u2a_fast.demo import run
from u2a_fast.demo.claims import claims
from u2a_fast.demo.corpus import CorpusSize, make_corpus, vocabulary
from u2a_fast.demo.experiment import ARMS, matched_losses
from u2a_fast.demo.grammar import TOPICS
from u2a_fast.demo.model import make_model, make_tokenizer

SEEDS = (10, 11)


def test_a_corpus_follows_from_its_seed() -> None:
    assert make_corpus(3) == make_corpus(3)
    assert make_corpus(3) != make_corpus(4)


def test_the_planted_truth_is_true() -> None:
    corpus, size = make_corpus(0), CorpusSize()
    originals = {row["id"]: row for row in corpus.negatives if row["duplicate_of"] is None}
    assert sum(row["kind"] == "harmful" for row in originals.values()) == size.harmful
    assert sum(row["kind"] == "harmless" for row in originals.values()) == size.mislabeled
    assert len(corpus.negatives) - len(originals) == size.duplicates
    texts = {
        kind: {text.format(thing=thing) for topic in TOPICS.values() for thing in topic.things for text in of(topic)}
        for kind, of in {"harmful": lambda t: t.harmful, "harmless": lambda t: t.harmless}.items()
    }
    for row in corpus.negatives:
        other = {"harmful": "harmless", "harmless": "harmful"}[row["kind"]]
        assert any(text in row["response"] for text in texts[row["kind"]])
        assert not any(text in row["response"] for text in texts[other])
        if row["duplicate_of"] is not None:
            assert row["response"] == originals[row["duplicate_of"]]["response"]


def test_heldout_prompts_were_never_shown() -> None:
    corpus = make_corpus(0)
    heldout = {row["prompt"] for row in corpus.heldout}
    for part in (corpus.negatives, corpus.positives, corpus.preferences):
        assert heldout.isdisjoint(row["prompt"] for row in part)


def test_the_tokenizer_knows_every_word(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(vocabulary())
    rows = read_negatives(make_corpus(5).write(tmp_path)["negatives"], tokenizer)
    for row in rows:
        assert tokenizer.unk_token_id not in row["input_ids"]
        assert row["labels"][-1] == tokenizer.eos_token_id


def test_a_model_follows_from_its_seed_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = make_model(50, seed=7)
    assert torch.equal(torch.rand(3), expected), "the caller's random numbers were disturbed"
    second = make_model(50, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_arms_are_compared_where_they_have_forgotten_as_much() -> None:
    # the second arm forgets 0.4 at most; the first crosses 0.4 a quarter of the way from 0.3 to 0.7
    paths = [[(0.0, 1.0), (0.3, 0.8), (0.7, 0.4)], [(0.0, 1.0), (0.4, 0.9)]]
    level, losses = matched_losses(paths)
    assert level == 0.4
    assert losses == pytest.approx([0.7, 0.9])
    # an arm that learns instead of forgetting pulls the comparison back to the start
    assert matched_losses([paths[0], [(0.0, 1.0), (-0.2, 1.1)]]) == (0.0, [1.0, 1.0])


def test_claims_can_fail() -> None:
    row = {"seed": 1, "auc_identity": 0.8, "auc_fisher": 0.95, "matched_loss": 0.5}
    rows = [{**row, "arm": arm, "heldout_loss": loss} for arm, loss in zip(ARMS, (0.6, 0.7, 0.5, 0.8), strict=True)]
    judged = {claim["name"]: claim["holds"] for claim in claims(rows, "fisher", -0.1)}
    assert judged == {"auc": True, "matched steps": False, "matched forgetting": False, "realized gain": False}
    assert not claims(rows, "identity", 0.5)[0]["holds"]


def test_a_small_run_shows_what_the_demo_claims(tmp_path: Path) -> None:
    """One test, because tests share the cores and the run takes half a minute."""
    result = run(tmp_path, seeds=SEEDS, fast=True, device="cpu")
    _check_claims(tmp_path, result)
    _check_files(tmp_path, result)


def _check_claims(out: Path, result: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["arm"]) for row in rows] == [(seed, arm) for seed in SEEDS for arm in ARMS]
    for seed in SEEDS:
        arms = {row["arm"]: row for row in rows if row["seed"] == seed}
        assert arms["u2a"]["auc_fisher"] >= 0.9
        assert all(arms["u2a"]["heldout_loss"] < arms[arm]["heldout_loss"] for arm in ARMS[1:])
        assert arms["u2a"]["heldout_loss"] < arms["u2a"]["path"][0][1]
    assert {claim["name"]: claim["holds"] for claim in result["claims"]}["matched steps"]


def _check_files(out: Path, result: dict[str, Any]) -> None:
    """The run leaves what the command line's verbs would."""
    scores = pq.read_table(out / "score" / "scores.parquet")
    truth = [json.loads(line)["id"] for line in (out / "corpus" / "negatives.jsonl").read_text().splitlines()]
    assert scores.column("id").to_pylist() == truth
    for part in ("score", "select", "unlearn", "align", "evaluate"):
        assert (out / part / "run.yaml").is_file()
    for model in ("model", "unlearn/model", "align/model"):
        assert (out / model / "model.safetensors").is_file()
        assert (out / model / "tokenizer.json").is_file()
    assert Path(result["report"]).is_file()
    json.dumps(result, allow_nan=False)

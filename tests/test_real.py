"""A real small model with real preference data, where a checkout of them lies beside the project."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import u2a_fast
from u2a_fast.data import read_negatives, read_preferences

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL, DATA = SHARED / "models" / "hh-tiny", SHARED / "data" / "hh-harmless"
pytestmark = pytest.mark.skipif(
    not (MODEL.is_dir() and DATA.is_dir()), reason="needs ../shared/models/hh-tiny and ../shared/data/hh-harmless"
)


@pytest.fixture(scope="module")
def setting() -> tuple[torch.nn.Module, u2a_fast.DPO, list[dict[str, object]]]:
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = read_preferences(DATA / "preferences.jsonl", tokenizer, add_bos=True)
    negatives = read_negatives(DATA / "negatives.jsonl", tokenizer, add_bos=True)
    sample = [row for i, row in enumerate(negatives) if i % 50 == 0]
    return model, u2a_fast.DPO(rows[:20], beta=0.3), sample


def test_scores_agree_with_per_example_autograd(
    setting: tuple[torch.nn.Module, u2a_fast.DPO, list[dict[str, object]]],
) -> None:
    model, objective, sample = setting
    scorer = u2a_fast.InfluenceScorer(model, None, objective)
    scores = scorer.score(sample)
    direction = scorer.direction()
    want = []
    for row in sample:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        model.zero_grad()
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        grads = torch.autograd.grad(loss, [dict(model.named_parameters())[name] for name in direction])
        want.append(
            -sum((g.double() * v.double()).sum().item() for g, v in zip(grads, direction.values(), strict=True))
        )
    assert len(sample) == 40 and scores.nonfinite == 0
    error = np.abs(scores.score - want).max() / np.abs(want).max()
    assert error <= 1e-4, f"relative error {error:.1e}"


def test_bfloat16_ranks_like_float32(setting: tuple[torch.nn.Module, u2a_fast.DPO, list[dict[str, object]]]) -> None:
    model, objective, sample = setting
    exact = u2a_fast.InfluenceScorer(model, None, objective).score(sample).score
    half = u2a_fast.InfluenceScorer(model, None, objective, dtype=torch.bfloat16).score(sample).score
    assert u2a_fast.statistics.spearman(exact, half) >= 0.99


def test_rows_of_the_file_are_read_in_order(
    setting: tuple[torch.nn.Module, u2a_fast.DPO, list[dict[str, object]]],
) -> None:
    with (DATA / "negatives.jsonl").open() as file:
        ids = [json.loads(line)["id"] for line in file]
    assert [row["id"] for row in setting[2]] == ids[::50]

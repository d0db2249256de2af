"""What the demo claims, judged from its rows, and the tables that show it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from u2a_fast.demo.experiment import ARMS

__all__ = ["AUC_FLOOR", "SEEDS_FLOOR", "claims", "seed_rows", "summary"]

AUC_FLOOR = 0.9
SEEDS_FLOOR = 0.9  # share of seeds in which u2a must be best

Row = Mapping[str, Any]

_BASELINES = ARMS[1:]


def _by_seed(rows: Sequence[Row]) -> dict[int, dict[str, Row]]:
    seeds: dict[int, dict[str, Row]] = {}
    for row in rows:
        seeds.setdefault(row["seed"], {})[row["arm"]] = row
    return seeds


def _beats_all(arms: Mapping[str, Row], key: str) -> bool:
    return all(arms["u2a"][key] < arms[arm][key] for arm in _BASELINES)


def seed_rows(rows: Sequence[Row], key: str) -> list[dict[str, Any]]:
    """One row a seed: AUCs, every arm's loss under ``key``, and whether ``u2a`` has the lowest."""
    return [
        {
            "seed": seed,
            "AUC identity": arms["u2a"]["auc_identity"],
            "AUC fisher": arms["u2a"]["auc_fisher"],
            **{arm: arms[arm][key] for arm in ARMS},
            "u2a lowest": _beats_all(arms, key),
        }
        for seed, arms in _by_seed(rows).items()
    ]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over seeds, one line an arm."""
    columns = {
        "held-out loss": "heldout_loss",
        "held-out accuracy": "heldout_accuracy",
        "NLL rise, negatives": "nll_rise",
        "NLL rise, positives": "utility_rise",
        "loss, matched forgetting": "matched_loss",
    }
    lines = []
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm]
        lines.append([arm, *(float(np.mean([row[key] for row in own])) for key in columns.values())])
    return {"header": ["arm", *columns], "rows": lines}


def claims(rows: Sequence[Row], curvature: str, rank_correlation: float) -> list[dict[str, Any]]:
    """Each claim as a sentence with its figures, and whether it holds; a claim that fails is printed all the same."""
    seeds = _by_seed(rows)
    aucs = np.array([arms["u2a"][f"auc_{curvature}"] for arms in seeds.values()])
    clear = int((aucs >= AUC_FLOOR).sum())
    lowest = sum(_beats_all(arms, "heldout_loss") for arms in seeds.values())
    matched = sum(_beats_all(arms, "matched_loss") for arms in seeds.values())
    n, others = len(seeds), "uniform, random and bottom"
    return [
        {
            "name": "auc",
            "holds": clear == n,
            "text": f"Planted harmful negatives score above planted harmless ones: AUC {aucs.mean():.3f} on average, "
            f"{aucs.min():.3f} at worst, at least {AUC_FLOOR} in {clear} of {n} seeds (asked: all).",
        },
        {
            "name": "matched steps",
            "holds": lowest >= SEEDS_FLOOR * n,
            "text": "At matched steps and learning rate, held-out preference loss is lower after u2a than after "
            f"{others} in {lowest} of {n} seeds (asked: {SEEDS_FLOOR:.0%}).",
        },
        {
            "name": "matched forgetting",
            "holds": matched >= SEEDS_FLOOR * n,
            "text": f"At matched forgetting (equal rise of the negatives' mean NLL), it is lower than after {others} "
            f"in {matched} of {n} seeds.",
        },
        {
            "name": "realized gain",
            "holds": rank_correlation > 0,
            "text": "Predicted gains agree in rank with realized gains of negatives unlearned one at a time: "
            f"Spearman {rank_correlation:.3f}.",
        },
    ]

"""A round of the loop on disk: round-NN/{scores.parquet, selection.parquet, parameters.safetensors, metrics.json}.

metrics.json is written last, so a round that has it is whole; every file is whole or absent.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from torch import nn

from u2a_fast.influence.scorer import Scores
from u2a_fast.store import read_selection, write_atomically, write_budget, write_scores, write_text
from u2a_fast.unlearning.snapshot import save_trainable

__all__ = ["RoundFiles", "complete_rounds", "drop_parameters"]


class RoundFiles:
    """The folder of round ``number`` under ``out``."""

    def __init__(self, out: Path, number: int) -> None:
        self.folder = out / f"round-{number:02d}"
        self.selection = self.folder / "selection.parquet"
        self.parameters = self.folder / "parameters.safetensors"

    def start_over(self) -> None:
        """Remove what an interrupted attempt at this round left."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def write_scores(self, scores: Scores) -> None:
        """One row a negative, as ``score`` writes it."""
        write_scores(self.folder / "scores.parquet", scores)

    def finish(self, model: nn.Module, metrics: Mapping[str, Any], budget: Mapping[str, int]) -> None:
        """Write the trainable parameters, which batches were found to fit in memory, and then the metrics."""
        write_atomically(self.parameters, lambda temporary: save_trainable(model, temporary))
        write_budget(self.folder, budget)
        write_text(self.folder / "metrics.json", json.dumps(dict(metrics), indent=2) + "\n")

    def nll(self) -> np.ndarray:
        """NLL (n) of all negatives when the round began."""
        return pq.read_table(self.folder / "scores.parquet", columns=["nll"]).column("nll").to_numpy()

    def weights(self) -> dict[str, float]:
        """Weight of every chosen negative by id."""
        table = read_selection(self.selection)
        return dict(zip(table["id"].tolist(), table["weight"].tolist(), strict=True))


def complete_rounds(out: Path) -> list[dict[str, Any]]:
    """Metrics of the whole rounds under ``out``, from round 0 to the first that is missing."""
    metrics: list[dict[str, Any]] = []
    while (path := RoundFiles(out, len(metrics)).folder / "metrics.json").exists():
        metrics.append(json.loads(path.read_text()))
    return metrics


def drop_parameters(out: Path, keep: set[int]) -> None:
    """Remove the parameters of the rounds that are not in ``keep``; their other files stay."""
    for path in out.glob("round-*/parameters.safetensors"):
        if int(path.parent.name.removeprefix("round-")) not in keep:
            path.unlink()

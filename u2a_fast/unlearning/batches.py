"""Weighted negatives as a dataset, padded into the batches that a Trainer wants and back into examples."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from u2a_fast.data.packing import IGNORE_INDEX, Example

__all__ = ["WeightedNegatives", "collate", "unpad"]


class WeightedNegatives(Dataset[dict[str, Any]]):
    """Rows ``input_ids``, ``labels``, ``weight`` and ``index`` (the row's own position).

    Args:
        examples: n token examples.
        weights: n finite weights >= 0.

    Raises:
        ValueError: lengths differ, there is no example, or a weight is out of its range.
    """

    def __init__(self, examples: Sequence[Example], weights: Sequence[float]) -> None:
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        if not len(examples) or self.weights.shape != (len(examples),):
            raise ValueError(
                "[unlearn] expected as many weights as negatives, at least one, got weights of shape "
                f"{tuple(self.weights.shape)} for {len(examples)} negatives"
            )
        if not (self.weights.isfinite().all() and (self.weights >= 0).all() and self.weights.any()):
            raise ValueError("[unlearn] expected finite weights >= 0, not all 0")
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        return {
            "input_ids": example["input_ids"],
            "labels": example["labels"],
            "weight": self.weights[index].item(),
            "index": index,
        }


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pad rows to (B, T) ``input_ids``, ``labels`` and ``attention_mask``, and keep ``weight`` and ``index``, (B).

    Padding is marked by the mask alone, so a missing pad token, or one that is also the end of sequence, is no matter.
    """
    ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    labels = [torch.as_tensor(row["labels"]) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad([torch.ones_like(x) for x in ids], batch_first=True),
        "weight": torch.tensor([row["weight"] for row in rows], dtype=torch.float64),
        "index": torch.tensor([row["index"] for row in rows]),
    }


def unpad(batch: Mapping[str, Tensor]) -> list[Example]:
    """The token examples of a collated batch."""
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    lengths = batch["attention_mask"].sum(-1).tolist()
    return [{"input_ids": ids[i, :n], "labels": labels[i, :n]} for i, n in enumerate(lengths)]

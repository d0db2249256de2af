"""Which blocks of a model carry the scores: measured on a sample, chosen by share under a cost.

A module's share of the scores is its part's covariance with them over their variance; shares add up to 1. Backward
stops at the lowest module that counts, so of L equal blocks a set of c from block l up costs (L - l) / L units of
backward pass and c / L of contractions; everything costs 2. What lies above the blocks (the final norm, the head)
always counts; what lies below them (embeddings) counts where block 0 does.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from u2a_fast.influence.lowrank import Approximation
from u2a_fast.models.decoder import Decoder
from u2a_fast.statistics import spearman

__all__ = ["LayerChoice", "block_of", "choose_layers", "keep_layers"]

_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class LayerChoice:
    """What counts.

    Attributes:
        blocks: indices, increasing.
        below: paths of the modules that are called before the blocks.
        share: squared correlation of the scores by these blocks with the whole scores, on the sample.
        spearman: their rank correlation.
    """

    blocks: tuple[int, ...]
    below: frozenset[str]
    share: float
    spearman: float


def block_of(path: str) -> int | None:
    """The index in a module's or parameter's path that counts blocks, its first; None outside of the blocks."""
    found = _BLOCK.search(f"{path}.")
    return int(found[1]) if found else None


def choose_layers(parts: Mapping[str, np.ndarray], fraction: float) -> LayerChoice:
    """The blocks of the largest share among those whose backward and contractions cost at most ``fraction`` of all.

    Args:
        parts: (n) of each score by module path, in the order of the modules' calls.
        fraction: of the two units beyond the forward pass.
    """
    numbered = [block_of(path) for path in parts]
    count = 1 + max((b for b in numbered if b is not None), default=-1)
    if not count:
        raise ValueError("[layers] expected parameters in blocks that their modules' names number, got none")
    first = next(i for i, b in enumerate(numbered) if b is not None)
    values = np.stack(list(parts.values()))
    blocks = np.zeros((count, values.shape[1]))
    for i, (block, value) in enumerate(zip(numbered, values, strict=True)):
        if block is not None or i < first:
            blocks[block or 0] += value
    total = values.sum(0)
    shares = blocks @ (total - total.mean()) / (np.square(total - total.mean()).sum() or 1.0)
    chosen = _choose(shares, fraction)
    reached = total - blocks.sum(0) + blocks[list(chosen)].sum(0)
    correlation = float(np.corrcoef(reached, total)[0, 1]) if np.ptp(reached) * np.ptp(total) > 0 else float("nan")
    return LayerChoice(chosen, frozenset(list(parts)[:first]), correlation**2, spearman(reached, total))


def _choose(shares: np.ndarray, fraction: float) -> tuple[int, ...]:
    """The set of blocks of the largest share that the cost allows; the last one where it allows none."""
    count = len(shares)
    chosen: tuple[int, ...] = (count - 1,)
    most = -np.inf
    for lowest in range(count):
        room = int(2 * fraction * count + 1e-9) - (count - lowest)  # contractions left after the backward pass
        if room < 1:
            continue
        above = [b for b in np.argsort(-shares, kind="stable") if b > lowest and shares[b] > 0]
        blocks = [lowest, *above[: room - 1]]
        if (share := float(shares[blocks].sum())) > most:
            chosen, most = tuple(sorted(int(b) for b in blocks)), share
    return chosen


def keep_layers(decoder: Decoder, directions: Mapping[str, Tensor], *, choice: LayerChoice) -> Approximation:
    """Directions (K, *shape) of the chosen blocks and of what lies above them; the head's own use is not touched."""
    kept = {}
    for name, v in directions.items():
        block, path = block_of(name), name.rpartition(".")[0]
        if block is None and path in choice.below:
            block = 0
        if block is None or block in choice.blocks:
            kept[name] = v
    return Approximation(kept)

"""Prompts that several examples have in common, packed once: a root segment that each answer continues.

Only a pass that carries tangents forward may share: every example's derivative is read off its own answer, while a
backward pass would mix the examples in the prompt's gradient.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from u2a_fast.data.packing import IGNORE_INDEX, Example, Packed, check_keys, offsets, pack, plan_batches

__all__ = ["pack_shared", "shared_batches"]


def _prompt(example: Example) -> tuple[int, ...]:
    """Token ids before the first scored token; they predict it."""
    labels: Any = example["labels"]
    scored = (int(y) != IGNORE_INDEX for y in labels[1:])
    first = next((t for t, is_scored in enumerate(scored) if is_scored), -1)
    return tuple(int(x) for x in example["input_ids"][: first + 1])


def _groups(examples: Sequence[Example]) -> dict[tuple[int, ...], list[int]]:
    """Positions of the examples by prompt, in order of first appearance."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, example in enumerate(examples):
        check_keys(i, example)
        found.setdefault(_prompt(example), []).append(i)
    return found


def pack_shared(examples: Sequence[Example]) -> Packed:
    """``pack``, with a prompt that several examples begin with laid out once, before the answers that continue it.

    ``cu_seqlens``, ``lengths`` and ``parent`` describe segments, prompts and answers; ``rows``, ``target``,
    ``cu_targets`` and ``scored`` describe examples in the order given, whose rows may lie in a shared prompt.

    Raises:
        ValueError: an example is malformed or has no scored token.
    """
    whole = pack(examples)
    starts, row_starts = whole.cu_seqlens.tolist(), whole.cu_targets.tolist()
    tokens: list[Tensor] = []  # of every segment, as positions in ``whole``
    parents: list[int] = []
    rows = whole.rows.clone()
    n = 0

    def add(first: int, last: int, parent: int) -> int:
        nonlocal n
        tokens.append(torch.arange(first, last))
        parents.append(parent)
        n += last - first
        return n - (last - first)

    for prompt, members in _groups(examples).items():
        shared = len(prompt) if len(members) > 1 else 0
        root = len(parents)
        start = add(starts[members[0]], starts[members[0]] + shared, -1) if shared else n
        for i in members:
            own = add(starts[i] + shared, starts[i + 1], root if shared else -1)
            mine = rows[row_starts[i] : row_starts[i + 1]]  # a view: rows change in place
            offset = mine - starts[i]
            mine.copy_(torch.where(offset < shared, start + offset, own + offset - shared))
    order = torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int64)
    lengths = [len(segment) for segment in tokens]
    return replace(
        whole,
        input_ids=whole.input_ids[order],
        position_ids=whole.position_ids[order],
        cu_seqlens=offsets(lengths),
        lengths=tuple(lengths),
        parent=torch.tensor(parents, dtype=torch.int32),
        rows=rows,
    )


def shared_batches(examples: Sequence[Example], token_budget: int) -> list[tuple[list[int], list[Example]]]:
    """Batches for ``pack_shared``, examples of one prompt together: (positions, examples) of every batch.

    The budget counts a shared prompt once; a prompt with more answers than fit is repeated in every batch it needs. The
    plan is a pure function of its arguments.
    """
    chunks: list[list[int]] = []
    costs: list[int] = []
    for prompt, members in _groups(examples).items():
        fits = False
        for i in members:
            own = len(examples[i]["input_ids"]) - len(prompt)
            fits = fits and costs[-1] + own <= token_budget
            if not fits:
                chunks.append([])
                costs.append(len(prompt))
                fits = True
            chunks[-1].append(i)
            costs[-1] += own
    plan = ([i for chunk in batch for i in chunks[chunk]] for batch in plan_batches(costs, token_budget))
    return [(positions, [examples[i] for i in positions]) for positions in plan]

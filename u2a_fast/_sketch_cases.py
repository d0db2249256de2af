"""The ``grad_sketch`` rows of the case table: their inputs, error scales and cost, for :mod:`u2a_fast.testing`."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference
from .sketch import sketch_map

if TYPE_CHECKING:
    from .testing import Case

__all__ = ["cost", "inputs", "rows", "scales", "timing_rows"]

Row = tuple[str, dict[str, int], dict[str, Any]]


def _row(i: int, o: int, m: int, lengths: tuple[int, ...]) -> Row:
    return "grad_sketch", {"N": sum(lengths), "B": len(lengths), "I": i, "O": o, "M": m}, {"lengths": lengths}


def rows() -> Iterator[Row]:
    """Parity rows: sketches of any length, layers off the sketch's blocks and words of signs, empty everything."""
    # I, O, M, tokens of each example.
    table: list[tuple[int, int, int, tuple[int, ...]]] = [
        (3, 5, 32, (2, 0, 4)),
        (64, 48, 64, (1, 31, 0, 0, 32)),
        (33, 65, 100, (1, 1, 1, 17, 0)),
        (257, 31, 1000, (40, 3)),
        (40, 200, 256, (33,)),
        (7, 9, 50, ()),
        (7, 9, 50, (0, 0, 0)),
        (0, 9, 50, (2, 1)),
        (7, 0, 50, (2, 1)),
        (1, 1, 32, (1,)),
        (130, 260, 1024, (5, 70, 1)),
        (130, 140, 8192, (5, 2)),
    ]
    for i, o, m, lengths in table:
        yield _row(i, o, m, lengths)


def timing_rows() -> Iterator[Row]:
    """Timing rows: layers of small models, and one long sketch."""
    lengths = (128,) * 16
    for i, o in ((256, 256), (256, 704), (704, 256), (384, 1024), (1024, 1024)):
        yield _row(i, o, 1024, lengths)
    yield _row(1024, 1024, 8192, lengths)


def inputs(case: "Case", normal: Callable[..., Tensor], generator: torch.Generator) -> dict[str, Any]:
    """Arguments of ``case``: normal entries, a seed of 63 bits."""
    n, i, o, m = (case.sizes[c] for c in "NIOM")
    cu_seqlens = torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int32)
    seed = torch.randint(2**63 - 1, (1,), generator=generator)
    return {"a": normal(n, i), "g": normal(n, o), "cu_seqlens": cu_seqlens, "dim": m, "seed": int(seed)}


def scales(wide: dict[str, Any]) -> tuple[Tensor, ...]:
    """Every entry's sum with each term replaced by its magnitude."""
    a, g, cu_seqlens, dim, seed = (wide[name] for name in ("a", "g", "cu_seqlens", "dim", "seed"))
    entry, sign = sketch_map(g.shape[1], a.shape[1], dim, seed, a.device)
    return (reference._sketch(a.abs(), g.abs(), cu_seqlens, dim, entry, sign.abs()),)


def cost(case: "Case") -> tuple[int, int]:
    """Flops of all entries of all G_i and one addition each; bytes of a, g and the sketches."""
    n, b, i, o, m = (case.sizes[c] for c in "NBIOM")
    element = torch.finfo(case.dtype).bits // 8
    return (2 * n + b) * i * o, element * n * (i + o) + max(4, element) * b * m

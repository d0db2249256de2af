"""The sketch: its generator against published vectors, its map against plain integers, its quality against the theory.

The statistics are of fixed seeds, so that a test passes always or never; each would fail for a map that is biased or
whose coordinates meet more often than the theory says.
"""

import math

import pytest
import torch
from torch import Tensor

from u2a_fast import ops, reference
from u2a_fast.sketch import philox4x32, sketch_block, sketch_map

CPU = torch.device("cpu")

# Known answers of Philox4x32-10 as published with Random123 (Salmon et al. 2011): counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_words(counter: str, key: str, answer: str) -> None:
    low, high = words(key)
    c0, c1, c2, c3 = (torch.tensor([word]) for word in words(counter))
    assert [int(word) for word in philox4x32((c0, c1, c2, c3), low | high << 32)] == words(answer)


def philox_of_integers(counter: tuple[int, int, int, int], seed: int) -> list[int]:
    c, key = list(counter), [seed % 2**32, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ key[0], second % 2**32, first >> 32 ^ c[3] ^ key[1], first % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize("dim", [32, 63, 100, 1024, 5000, 8192])
def test_the_map_is_the_documented_one(dim: int) -> None:
    seed, rows, columns = 2**61 + 2**35 + 3, *sketch_block(dim)
    assert dim / 2 < rows * columns <= dim
    entry, sign = sketch_map(300, 150, dim, seed, CPU)
    for o, i in ((0, 0), (1, 31), (5, 32), (127, 63), (130, 64), (255, 149), (299, 100)):
        bits = philox_of_integers((o // 4, i // 32, 0, 0), seed)[o % 4]
        shift = philox_of_integers((o // rows, i // columns, 1, 0), seed)[0] * dim >> 32
        assert entry[o, i] == (o % rows * columns + i % columns + shift) % dim
        assert sign[o, i] == 1 - 2 * (bits >> i % 32 & 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [32, 257, 2048, 8192])
def test_kernels_draw_the_same_sketch(dim: int, dtype: torch.dtype) -> None:
    """Example i sketches e_i times small integers, which every dtype adds exactly in any order."""
    i, o = 70, 521
    seed = 2**62 + 2**33 + 5
    a, g = torch.eye(i, dtype=dtype), (torch.arange(i * o) % 251 + 1).reshape(i, o).to(dtype)
    cu_seqlens = torch.arange(i + 1, dtype=torch.int32)
    want = reference.grad_sketch(a.double(), g.double(), cu_seqlens, dim, seed)
    assert torch.equal(ops.grad_sketch(a, g, cu_seqlens, dim, seed).double(), want)


def test_a_part_of_a_layer_has_its_part_of_the_map() -> None:
    entry, sign = sketch_map(300, 150, 1024, 9, CPU)
    part = sketch_map(77, 41, 1024, 9, CPU)
    assert torch.equal(entry[:77, :41], part[0]) and torch.equal(sign[:77, :41], part[1])


def gradient(kind: str) -> Tensor:
    """One hard matrix (O, I) a kind."""
    o, i = 24, 96
    x = torch.randn(o, i, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if kind == "one column":
        x[:, :37], x[:, 38:] = 0, 0
    elif kind == "one row":
        x[:11], x[12:] = 0, 0
    elif kind == "every 32nd column":
        x[:, torch.arange(i) % 32 != 5] = 0
    elif kind == "heavy":
        x[3, 7], x[20, 70] = 100, -100
    elif kind == "of one sign":
        x = x.abs()
    return x


def sketches(x: Tensor, dim: int, seeds: int) -> Tensor:
    """S x (seeds, dim) for the seeds 0, 1, ..: token o has the input x[o] and the gradient e_o."""
    g, a = torch.eye(x.shape[0], dtype=x.dtype), x
    cu_seqlens = torch.tensor([0, x.shape[0]], dtype=torch.int32)
    return torch.cat([ops.grad_sketch(a, g, cu_seqlens, dim, seed) for seed in range(seeds)])


def exact_variance(x: Tensor, y: Tensor, dim: int) -> float:
    """Of <Sx, Sy>, as derived in u2a_fast/sketch.py."""
    rows, columns = sketch_block(dim)
    total = x.square().sum() * y.square().sum() + (x * y).sum() ** 2
    for p, q in zip(blocks(x, rows, columns), blocks(y, rows, columns), strict=True):
        total = total - p.square().sum() * q.square().sum() - (p * q).sum() ** 2
    return float(total) / dim


def blocks(x: Tensor, rows: int, columns: int) -> list[Tensor]:
    return [block for strip in x.split(rows, 0) for block in strip.split(columns, 1)]


@pytest.mark.parametrize("dim", [64, 100])
@pytest.mark.parametrize("kind", ["dense", "one column", "one row", "every 32nd column", "heavy", "of one sign"])
def test_inner_products_are_unbiased_with_the_theorys_variance(kind: str, dim: int) -> None:
    seeds, x = 3000, gradient(kind)
    y = x.roll(1, 1) + 0.5 * x if kind == "heavy" else 0.7 * x + 0.3 * gradient("dense")
    products = (sketches(x, dim, seeds) * sketches(y, dim, seeds)).sum(1)
    error = products - (x * y).sum()
    variance = exact_variance(x, y, dim)
    assert abs(error.mean()) <= 4 * math.sqrt(variance / seeds)
    # the standard error of a mean of squares, from the squares themselves
    squares = error.square()
    assert abs(squares.mean() - variance) <= 4 * squares.std() / math.sqrt(seeds)
    assert variance <= 2 * x.square().sum() * y.square().sum() / dim


def test_norms_and_angles_at_a_thousand_entries() -> None:
    """Root mean square relative error of squared norms sqrt(2 / dim), and errors no larger than a normal's tail."""
    dim, seeds = 1024, 400
    generator = torch.Generator().manual_seed(3)
    a, g = (torch.randn(60, n, generator=generator) for n in (200, 150))
    cu_seqlens = torch.tensor([0, 10, 30, 60], dtype=torch.int32)
    exact = torch.stack([(g[i:j].T @ a[i:j]).flatten() for i, j in ((0, 10), (10, 30), (30, 60))])
    drawn = torch.stack([ops.grad_sketch(a, g, cu_seqlens, dim, seed) for seed in range(seeds)])
    scale = exact.norm(dim=1)[:, None] * exact.norm(dim=1)[None, :]
    error = (drawn @ drawn.mT - exact @ exact.T) / scale
    cosine = exact @ exact.T / scale
    limit = ((1 + cosine.square()) / dim).sqrt()
    spread = error.square().mean(0).sqrt()
    assert (spread <= limit * (1 + 4 / math.sqrt(2 * seeds))).all()
    # 9 * 400 draws of a normal exceed 5 standard deviations with probability 0.002
    assert (error.abs() <= 5 * limit).all()


def test_seeds_differ() -> None:
    first, second = (sketch_map(100, 100, 1024, seed, CPU) for seed in (1, 2**32 + 1))
    same_sign = (first[1] == second[1]).double().mean()
    assert abs(same_sign - 0.5) <= 4 * 0.5 / 100
    assert (first[0] == second[0]).double().mean() < 0.2

"""The definition of ``grad_sketch``: which entry each coordinate of a gradient goes to, and with which sign.

The sketch is a count sketch (Charikar, Chen and Farach-Colton 2002; feature hashing, Weinberger et al. 2009,
arXiv:0902.2206), the sparse Johnson-Lindenstrauss map with one nonzero a column: (S x)[m] is the sum of sigma_p x_p
over the coordinates p with h(p) = m. Its signs are independent, one a coordinate. Its entries are shared out by blocks:
the O x I coordinates are cut into blocks of R x C <= dim, and coordinate (r, c) of a block goes to

    h = (r C + c + shift of the block) mod dim,    the shifts independent and uniform on [0, dim),

so that a row of a block stays contiguous: vectors on a CPU and register tiles on a GPU are moved whole. This costs
nothing in variance: two coordinates of one block never meet, two of different blocks meet with probability 1 / dim,
which is what a count sketch with one independent entry a coordinate gives every pair.

For fixed x and y, <Sx, Sy> = <x, y> + sum_{p != q} sigma_p sigma_q [h(p) = h(q)] x_p y_q. The signs are independent of
one another and of h, so

    E <Sx, Sy>   = <x, y>,
    Var <Sx, Sy> = sum_{p != q} P(h(p) = h(q)) (x_p^2 y_q^2 + x_p y_p x_q y_q)
                 = (|x|^2 |y|^2 + <x, y>^2 - sum over blocks b of (|x_b|^2 |y_b|^2 + <x_b, y_b>^2)) / dim
                <= 2 |x|^2 |y|^2 / dim.

By Chebyshev's inequality |<Sx, Sy> - <x, y>| <= eps |x| |y| fails with probability at most 2 / (eps^2 dim). More
nonzeros a column (Kane and Nelson 2014, arXiv:1012.1577) leave the variance as it is and make large errors rarer for
vectors with few large coordinates; at one nonzero the tail is already that of a dense map where no coordinate holds
much of the norm (Dasgupta, Kumar and Sarlos 2010, arXiv:1004.4240; Freksen, Kamma and Larsen 2018, arXiv:1805.12539),
as in gradients, which are sums of outer products. One nonzero also makes the fewest additions, one a coordinate.

Signs and shifts are words of a counter-based generator, so that any part of the sketch can be made anywhere.
"""

import torch
from torch import Tensor

__all__ = ["MAX_DIM", "MIN_DIM", "philox4x32", "sketch_block", "sketch_map"]

SIGN_BITS = 32  # neighbors along a row that share a word of signs
MIN_DIM, MAX_DIM = SIGN_BITS, 8192  # a GPU holds an example's sketch in registers
_MOST_ROWS = 128  # of a block: a GPU's tile

_LOW = 0xFFFFFFFF


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of factor * x: int64 keeps the low 64 bits, and the shifted sign is masked away."""
    product = x * factor
    return (product >> 32) & _LOW, product & _LOW


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of Salmon et al. 2011 (doi:10.1145/2063384.2063405): a counter and a key to four random words.

    Args:
        counter: four words, int64 tensors of values in [0, 2^32).
        seed: the key, low word first.

    Returns:
        Four words, int64 tensors of values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def sketch_block(dim: int) -> tuple[int, int]:
    """Rows R and columns C of a block: the largest power of two R C <= dim, C = 32 where that leaves R <= 128."""
    entries = 1 << (dim.bit_length() - 1)
    rows = min(entries // SIGN_BITS, _MOST_ROWS)
    return rows, entries // rows


def _words(rows: int, columns: int, stream: int, seed: int, device: torch.device) -> tuple[Tensor, ...]:
    """Philox words at the counters (row, column, stream, 0), each (rows, columns)."""
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return philox4x32((row, column, torch.full_like(row, stream), torch.zeros_like(row)), seed)


def sketch_map(out_features: int, in_features: int, dim: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Entry in [0, dim) and sign, +1 or -1, of every coordinate (o, i).

    The sign of (o, i) is bit i mod 32 of word o mod 4 at counter (o div 4, i div 32, 0, 0), negative where it is set;
    the shift of block (k, l) is floor(w dim / 2^32) of word w = 0 at counter (k, l, 1, 0), uniform to dim / 2^32.

    Returns:
        (O, I) int64 and (O, I) int8.
    """
    bits = torch.arange(SIGN_BITS, device=device)
    words = torch.stack(_words(-(-out_features // 4), -(-in_features // SIGN_BITS), 0, seed, device), 1).flatten(0, 1)
    negative = ((words[:, :, None] >> bits) & 1).flatten(1)[:out_features, :in_features]

    rows, columns = sketch_block(dim)
    uniform = _words(-(-out_features // rows), -(-in_features // columns), 1, seed, device)[0]
    o = torch.arange(out_features, device=device)[:, None]
    i = torch.arange(in_features, device=device)[None, :]
    shift = ((uniform * dim) >> 32)[o // rows, i // columns]
    return (o % rows * columns + i % columns + shift) % dim, (1 - 2 * negative).to(torch.int8)

"""The head's own part of many directions, block of the vocabulary by block, against one product a direction."""

import pytest
import torch
from torch import Tensor, nn

from u2a_fast import ops
from u2a_fast.models import tiled_head
from u2a_fast.models.decoder import Head, segment_sum
from u2a_fast.models.tiled_head import TiledHead, tiled_head_is_cheaper

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
V, D, K = 1100, 24, 3  # two blocks and a part of one
LENGTHS = (40, 0, 1, 19)


def _draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _head(dtype: torch.dtype, bias: bool, softcap: float) -> Head:
    weight = nn.Parameter(_draw(V, D, dtype=dtype, seed=0), requires_grad=False)
    return Head(weight, nn.Parameter(_draw(V, dtype=dtype, seed=1)) if bias else None, 1.0, softcap)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("bias", "softcap"), [(False, 0.0), (True, 4.0)])
@pytest.mark.parametrize("given", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "made twice"])
def test_is_what_one_product_a_direction_gives(
    dtype: torch.dtype,
    bias: bool,
    softcap: float,
    given: tuple[str, ...],
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head, n = _head(dtype, bias, softcap), sum(LENGTHS)
    h = _draw(n, D, dtype=dtype, seed=2)
    target = torch.randint(V, (n,), generator=torch.Generator().manual_seed(3))
    target[0], target[1] = 511, 512  # the last column of a block and the first of the next
    dweight = _draw(K, V, D, dtype=dtype, seed=4) if "weight" in given else None
    dbias = _draw(K, V, dtype=dtype, seed=5) if "bias" in given else None
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    whole = torch.zeros(K, V, D, dtype=dtype) if dweight is None else dweight
    logp, lse, jvp = ops.linear_logprob_jvp(h, head.weight, target, None, whole, head.bias, dbias, softcap)
    upstream = -torch.rand(n, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(lse.dtype) - 0.1

    if not kept:
        monkeypatch.setattr(tiled_head, "KEPT_BYTES", 0)
    tiles = TiledHead(head, dweight, dbias)
    tiles.propagate(upstream[:40], h[:40], target[:40], cu_seqlens[:2])  # a batch of another size before it
    got_logp, dh, part = tiles.propagate(upstream, h, target, cu_seqlens)
    assert (tiles._room is not None) == kept

    zero = torch.zeros_like(upstream)
    want, _, _ = ops.linear_logprob_backward(
        upstream, zero, h, head.weight, target, lse, head.bias, softcap, need_weight=False
    )
    wanted = segment_sum(jvp * upstream, cu_seqlens)
    for got, expected in ((got_logp, logp), (dh, want.to(dh.dtype)), (part, wanted)):
        assert (got - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    assert part[:, 1].eq(0).all(), "an empty example"


def test_is_taken_where_it_is_cheaper() -> None:
    head = _head(torch.float32, False, 0.0)
    assert [tiled_head_is_cheaper(head, k, torch.float32) for k in (1, 2)] == [False, True]
    assert [tiled_head_is_cheaper(head, k, torch.bfloat16) for k in (1, 2, 6)] == [False, False, True]

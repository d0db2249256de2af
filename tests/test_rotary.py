"""Rotary embeddings with a short backward pass: gradients, what is left to the model's own function, putting back."""

import sys
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import Tensor, nn

from u2a_fast.models.fused import fused_tangents
from u2a_fast.models.rotary import short_rotaries

NAME = "apply_rotary_pos_emb"


def namespace(model: nn.Module) -> Any:
    return sys.modules[type(model).__module__]


def angles(tokens: int, features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (1, tokens, features) that differ between the halves, as no model's do."""
    draw = torch.Generator().manual_seed(1)
    turns = torch.randn(1, tokens, features, generator=draw)
    return turns.cos().to(dtype), turns.sin().to(dtype)


def leaves(dtype: torch.dtype, tokens: int = 5, features: int = 8) -> tuple[Tensor, Tensor]:
    """Queries of four heads and keys of two."""
    draw = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, heads, tokens, features, generator=draw).to(dtype).requires_grad_() for heads in (4, 2))
    return q, k


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"])
def test_values_and_gradients_are_the_models_own(dtype: torch.dtype, tolerance: float) -> None:
    model = tiny.build("llama", dtype)
    cos, sin = angles(5, 8, dtype)
    results = []
    for block in (None, short_rotaries(model)):
        q, k = leaves(dtype)
        if block is None:
            out = namespace(model).apply_rotary_pos_emb(q, k, cos, sin)
        else:
            with block:
                out = namespace(model).apply_rotary_pos_emb(q, k, cos, sin)
            assert {type(x.grad_fn).__name__ for x in out} == {"_RotaryBackward"}
        draw = torch.Generator().manual_seed(3)
        sum((x * torch.randn(x.shape, generator=draw).to(dtype)).sum() for x in out).backward()
        results.append((*out, q.grad, k.grad))
    for want, got in zip(*results, strict=True):
        assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi", "gpt-neox", "gpt2"])
def test_is_put_back(family: str) -> None:
    model = tiny.build(family, torch.float32)
    own = getattr(namespace(model), NAME, None)
    with short_rotaries(model):
        assert (getattr(namespace(model), NAME, None) is own) == (own is None)
    assert getattr(namespace(model), NAME, None) is own


def test_float64_models_keep_their_own() -> None:
    model = tiny.build("llama", torch.float64)
    own = namespace(model).apply_rotary_pos_emb
    with short_rotaries(model):
        assert namespace(model).apply_rotary_pos_emb is own


def test_what_needs_no_gradient_runs_the_models_own_operations() -> None:
    model = tiny.build("llama", torch.bfloat16).requires_grad_(False).eval()
    ids = torch.tensor([tiny.examples(1)[0]["input_ids"]])
    want = model(input_ids=ids, use_cache=False).logits
    with short_rotaries(model):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, want)


def test_parts_of_heads_and_several_sequences_run_the_models_own_operations() -> None:
    model = tiny.build("llama", torch.float32)
    own = namespace(model).apply_rotary_pos_emb
    q, k = leaves(torch.float32)
    cos, sin = angles(5, 8, torch.float32)
    with short_rotaries(model):
        out = namespace(model).apply_rotary_pos_emb(q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), cos, sin)
        turned = namespace(model).apply_rotary_pos_emb(q, k, cos.double(), sin.double())
    for got, want in (
        (out, own(q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), cos, sin)),
        (turned, own(q, k, cos.double(), sin.double())),
    ):
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("inner", [short_rotaries, fused_tangents], ids=lambda f: f.__name__)
def test_tangents_pass_through_whichever_block_is_inside(inner: Any) -> None:
    model = tiny.build("llama", torch.float32)
    outer = fused_tangents if inner is short_rotaries else short_rotaries
    (q, k), (cos, sin) = leaves(torch.float32), angles(5, 8, torch.float32)
    turn = lambda x: namespace(model).apply_rotary_pos_emb(x, k.detach(), cos, sin)[0]  # noqa: E731
    _, want = torch.func.jvp(turn, (q.detach(),), (q.detach().flip(1),))
    with outer(model), inner(model):
        _, got = torch.func.jvp(turn, (q.detach(),), (q.detach().flip(1),))
        grads = torch.autograd.grad(turn(q).sum(), q)[0]
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    assert (grads - torch.autograd.grad(turn(q).sum(), q)[0]).abs().max() <= 1e-5

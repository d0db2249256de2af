"""attn_implementation="u2a_fast" in transformers models: the values, gradients and tangents of the model's own."""

import pytest
import tiny_models as tiny
import torch
from torch import Tensor, nn

import u2a_fast  # noqa: F401  (registers the implementation)

FAMILIES = ["llama", "mistral", "gemma2", "gpt2", "opt", "gpt-neox"]
Parameters = dict[str, Tensor]


def _ids(batch: int = 3, length: int = 9) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def _loss(model: nn.Module, parameters: Parameters, ids: Tensor, mask: Tensor | None) -> Tensor:
    options = {"attention_mask": mask, "use_cache": False}
    logits = torch.func.functional_call(model, parameters, (ids,), options).logits
    weight = torch.ones_like(ids[..., None]) if mask is None else mask[..., None]
    return (logits.log_softmax(-1).square() * weight).sum()


def _both(model: nn.Module, mask: Tensor | None) -> list[tuple[Tensor, Tensor, Parameters]]:
    """(value, tangent, gradient) by the oracle and by ours."""
    ids, v = _ids(), tiny.direction(model)
    found = []
    for name in ("oracle", "u2a_fast"):
        model.set_attn_implementation(name)
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters: Parameters) -> Tensor:
            return _loss(model, parameters, ids, mask)

        value, tangent = torch.func.jvp(loss, (parameters,), (v,))
        inputs = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        grads = torch.autograd.grad(loss(inputs), list(inputs.values()), allow_unused=True)
        found.append((value, tangent, {n: g for n, g in zip(inputs, grads, strict=True) if g is not None}))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_values_tangents_and_gradients(family: str, padding: str) -> None:
    lengths = torch.tensor([9, 4, 6])[:, None]
    steps = torch.arange(9)
    masks = {"none": None, "left": (steps >= 9 - lengths).long(), "right": (steps < lengths).long()}
    model = tiny.build(family)
    with tiny.true_float64():
        (value, tangent, gradient), (our_value, our_tangent, our_gradient) = _both(model, masks[padding])
    torch.testing.assert_close(our_value, value, rtol=1e-11, atol=0)
    torch.testing.assert_close(our_tangent, tangent, rtol=1e-9, atol=1e-11 * float(value))
    assert gradient.keys() == our_gradient.keys()
    for name, want in gradient.items():
        torch.testing.assert_close(our_gradient[name], want, rtol=1e-9, atol=1e-11 * float(value), msg=name)


def test_flattened_batches_keep_to_themselves() -> None:
    model = tiny.build("llama")
    model.set_attn_implementation("u2a_fast")
    ids = _ids(1, 9)
    lengths = torch.tensor([0, 4, 9], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        options = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "position_ids": positions}
        got = model(ids, use_cache=False, **options).logits
        want = torch.cat([model(ids[:, a:b], use_cache=False).logits for a, b in ((0, 4), (4, 9))], 1)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_what_it_cannot_do_is_refused() -> None:
    model = tiny.build("llama")
    model.set_attn_implementation("u2a_fast")
    with pytest.raises(NotImplementedError, match="expected as many keys as queries"):
        model.generate(_ids(1, 4), max_new_tokens=3, do_sample=False)
    model.config.attention_dropout = 0.5
    model.model.layers[0].self_attn.attention_dropout = 0.5
    model.train()
    with pytest.raises(NotImplementedError, match=r"expected no dropout, got 0\.5"):
        model(_ids())

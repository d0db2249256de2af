"""Tokens' and modules' parts of a directional derivative are those of autograd, and add up to it."""

from collections.abc import Iterator

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from u2a_fast import directional_derivatives, module_derivatives, token_derivatives

FAMILIES = ["llama", "llama-tied", "gemma2", "gpt2"]
Example = dict[str, list[int]]


@pytest.fixture
def true_float64() -> Iterator[None]:
    with tiny.true_float64():
        yield


exact = pytest.mark.usefixtures("true_float64")


def token_nlls(model: nn.Module, example: Example) -> Tensor:
    """-log p of every scored token, by plain transformers and PyTorch."""
    ids, labels = torch.tensor(example["input_ids"]), torch.tensor(example["labels"])
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    nll = nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="none")
    return nll[labels[1:] != -100]


def close(got: Tensor, want: Tensor, scale: Tensor) -> bool:
    return bool((got - want).abs().max() <= 1e-10 * scale)


@exact
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens(family: str) -> None:
    model, batch = tiny.build(family), tiny.examples(5)
    batch.append(batch[1])  # a prompt that is shared
    v = tiny.direction(model)
    got = token_derivatives(model, batch, v, token_budget=40)
    assert [len(row) for row in got] == [sum(y != -100 for y in row["labels"][1:]) for row in batch]
    named = dict(model.named_parameters())
    for row, example in zip(got, batch, strict=True):
        want = []
        for nll in token_nlls(model, example):
            grads = torch.autograd.grad(nll, [named[name] for name in v], retain_graph=True, allow_unused=True)
            want.append(sum((g * d).sum() for g, d in zip(grads, v.values(), strict=True) if g is not None))
        want = torch.stack(want)
        assert row.dtype == torch.float64 and close(row, want, want.abs().max())
    for reduction, reduce in (("sum", torch.sum), ("mean", torch.mean)):
        whole = directional_derivatives(model, batch, v, reduction=reduction, mode="forward")
        assert close(torch.stack([reduce(row) for row in got]), whole, whole.abs().max())


@exact
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_modules(family: str, reduction: str) -> None:
    model, batch = tiny.build(family), tiny.examples(5)
    v = tiny.direction(model)
    got = module_derivatives(model, batch, v, reduction=reduction, token_budget=40)
    whole = tiny.per_example(model, batch, v, reduction)
    assert close(torch.stack(list(got.values())).sum(0), whole, whole.abs().max())

    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    embedding, head = (
        next(path for path, m in model.named_modules() if m is module)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    if tied:  # autograd knows one parameter, the two uses of which are two modules
        got[embedding] = got[embedding] + got.pop(head)
    named = {path for path, m in model.named_modules() if list(m.parameters(recurse=False))}
    assert set(got) == named - ({head} if tied else set())
    for path, part in got.items():
        own = {name: d for name, d in v.items() if name.rpartition(".")[0] == path}
        assert close(part, tiny.per_example(model, batch, own, reduction), whole.abs().max()), path


@exact
def test_modules_of_an_adapter_on_the_head() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny.build("llama"), config).double().eval()
    batch = tiny.examples(4)
    v = {name: d for name, d in tiny.direction(model).items() if "lora_" in name}
    got = module_derivatives(model, batch, v)
    assert set(got) == {name.rpartition(".")[0] for name in v}
    whole = tiny.per_example(model, batch, v)
    for path, part in got.items():
        want = tiny.per_example(model, batch, {name: d for name, d in v.items() if name.rpartition(".")[0] == path})
        assert close(part, want, whole.abs().max()), path


def test_only_modules_with_a_direction_are_named() -> None:
    model, batch = tiny.build("llama"), tiny.examples(3)
    v = {name: d for name, d in tiny.direction(model).items() if name.endswith("q_proj.weight")}
    got = module_derivatives(model, batch, v)
    assert list(got) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert module_derivatives(model, batch, {}) == {}
    assert [len(part) for part in module_derivatives(model, [], v).values()] == [0, 0]
    assert token_derivatives(model, [], v) == []
    assert all(torch.equal(row, torch.zeros_like(row)) for row in token_derivatives(model, batch, {}))


def test_parts_do_not_depend_on_companions() -> None:
    model, batch = tiny.build("llama").to(torch.float32), tiny.examples(6)
    v = tiny.direction(model)
    tokens, modules = (f(model, batch, v, batch_invariant=True) for f in (token_derivatives, module_derivatives))
    alone = token_derivatives(model, batch[2:3], v, batch_invariant=True)
    assert torch.equal(alone[0], tokens[2]) and alone[0].dtype == torch.float32
    for path, part in module_derivatives(model, batch[2:3], v, batch_invariant=True).items():
        assert part[0] == modules[path][2]

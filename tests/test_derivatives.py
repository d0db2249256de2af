"""Directional derivatives are those of autograd, one example at a time, for every family, selection and precision."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import u2a_fast
from u2a_fast.influence.derivatives import DerivativePass
from u2a_fast.models.decoder import sequence_logprobs
from u2a_fast.models.parameters import selected_parameters

EPS32 = torch.finfo(torch.float32).eps


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert want.isfinite().all() and got.isfinite().all()
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


Derivatives = Callable[..., torch.Tensor]


@pytest.fixture(params=["forward", "reverse"])
def derivatives(request: pytest.FixtureRequest) -> Derivatives:
    """``directional_derivatives`` by each exact route."""
    return partial(u2a_fast.directional_derivatives, mode=request.param)


@pytest.fixture
def true_float64() -> Iterator[None]:
    with tiny.true_float64():
        yield


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_families_float64(family: str, reduction: str, true_float64: None, derivatives: Derivatives) -> None:
    model, batch = tiny.build(family), tiny.examples(9)
    v = tiny.direction(model)
    got = derivatives(model, batch, v, reduction=reduction)
    assert got.dtype == torch.float64
    assert relative_error(got, tiny.per_example(model, batch, v, reduction)) <= 1e-10


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_families_float32(family: str, derivatives: Derivatives) -> None:
    batch = tiny.examples(9)
    model = tiny.build(family)
    v = tiny.direction(model)
    with tiny.true_float64():
        want = tiny.per_example(model, batch, v)
    model = model.to(torch.float32)
    got = derivatives(model, batch, {name: d.to(torch.float32) for name, d in v.items()})
    assert got.dtype == torch.float32
    assert relative_error(got, want) <= 1e-5


def test_torch_func_agrees(derivatives: Derivatives, true_float64: None) -> None:
    """The oracle of these tests is itself that of torch.func: vmap-free per-example gradients by functional_call."""
    model, batch = tiny.build("llama"), tiny.examples(4)
    v = tiny.direction(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def nll(p: dict[str, torch.Tensor], ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(model, p, (), {"input_ids": ids[None], "use_cache": False}).logits[0]
        return nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100)

    want = []
    for example in batch:
        grads = torch.func.grad(nll)(parameters, torch.tensor(example["input_ids"]), torch.tensor(example["labels"]))
        want.append(sum((grads[name] * v[name]).sum() for name in v))
    assert relative_error(derivatives(model, batch, v), torch.stack(want)) <= 1e-10


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("count", [3, 17])  # from 16 on they lie side by side
def test_several_directions_share_the_passes(
    count: int, family: str, derivatives: Derivatives, true_float64: None
) -> None:
    model, batch = tiny.build(family), tiny.examples(7)
    directions = [tiny.direction(model, seed) for seed in range(count)]
    directions[1].popitem()
    got = derivatives(model, batch, directions)
    want = torch.stack([tiny.per_example(model, batch, v) for v in directions])
    assert got.shape == (count, 7)
    assert relative_error(got, want) <= 1e-10


SELECTIONS = [
    *((family, kind) for family in ("llama-tied", "gpt2", "gpt-neox") for kind in ("linear", "norm", "embedding")),
    *(
        (family, kind)
        for family in ("llama-tied", "gpt2", "gpt-neox")
        for kind in ("bias", "lm_head", ["bias", "norm"])
    ),
    ("llama-tied", "re:layers.1.*proj"),
    ("gpt2", "re:h.0.*c_attn"),
]


@pytest.mark.parametrize(("family", "kind"), SELECTIONS)
def test_selections(family: str, kind: str | list[str], derivatives: Derivatives, true_float64: None) -> None:
    model, batch = tiny.build(family), tiny.examples(5)
    names = selected_parameters(model, kind)
    v = {name: d for name, d in tiny.direction(model).items() if name in names}
    got = derivatives(model, batch, v)
    assert relative_error(got, tiny.per_example(model, batch, v)) <= 1e-10


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj", "lm_head"], "all-linear"])
def test_lora(targets: list[str] | str, derivatives: Derivatives, true_float64: None) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny.build("llama"), config).double().eval()
    batch = tiny.examples(6)
    v = {name: d for name, d in tiny.direction(model).items() if name in selected_parameters(model, "lora")}
    assert v
    assert set(v) == set(selected_parameters(model, "trainable"))
    got = derivatives(model, batch, v)
    assert relative_error(got, tiny.per_example(model, batch, v)) <= 1e-10


def test_padding_index_of_an_embedding_has_no_gradient(derivatives: Derivatives, true_float64: None) -> None:
    model = tiny.build("llama")
    model.model.embed_tokens.padding_idx = 7
    ids = torch.tensor([5, 7, 9, 7, 11])
    batch = [{"input_ids": ids, "labels": ids}]
    v = {"model.embed_tokens.weight": tiny.direction(model)["model.embed_tokens.weight"]}
    got = derivatives(model, batch, v)
    assert relative_error(got, tiny.per_example(model, [{k: x.tolist() for k, x in batch[0].items()}], v)) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_size_order_and_budget_do_not_matter(dtype: torch.dtype, derivatives: Derivatives) -> None:
    model, batch = tiny.build("llama").to(dtype), tiny.examples(23)
    v = tiny.direction(model)
    want = derivatives(model, batch, v, token_budget=1)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(3))
    for budget in (13, 64, 4096):
        got = derivatives(model, [batch[i] for i in order], v, token_budget=budget)
        # a chain of some tens of roundings, each of a sum of up to 61 terms
        assert relative_error(got, want[order]) <= 100 * torch.finfo(dtype).eps


def test_unscored_tail_and_right_padding_change_nothing(derivatives: Derivatives) -> None:
    model, batch = tiny.build("mistral"), tiny.examples(6)
    v = tiny.direction(model)
    padded = [{"input_ids": e["input_ids"] + [0] * 9, "labels": e["labels"] + [-100] * 9} for e in batch]
    assert (
        torch.equal(
            derivatives(model, padded, v, token_budget=64),
            derivatives(model, batch, v, token_budget=64),
        )
        or relative_error(derivatives(model, padded, v), derivatives(model, batch, v)) <= 1e-13
    )


@pytest.mark.parametrize("mode", ["forward", "reverse", "lowrank"])
def test_what_is_set_up_once_gives_the_same_bits_in_every_call(mode: str) -> None:
    model, batch = tiny.build("llama", torch.float32), tiny.examples(12)
    v = tiny.direction(model)
    options: dict[str, Any] = {"mode": mode, "rank": 4, "token_budget": 64}
    derivatives = u2a_fast.DirectionalDerivatives(model, v, **options)
    assert derivatives.choice.mode == mode
    for some in (batch, batch[:5], batch):
        assert torch.equal(derivatives(some), u2a_fast.directional_derivatives(model, some, v, **options))
    assert u2a_fast.DirectionalDerivatives(model, [v, v])(batch).shape == (2, 12)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        derivatives(batch)


def test_same_run_same_bits(derivatives: Derivatives) -> None:
    model, batch = tiny.build("qwen3").to(torch.float32), tiny.examples(15)
    v = tiny.direction(model)
    first, second = (derivatives(model, batch, v, token_budget=40) for _ in range(2))
    assert torch.equal(first, second)


def test_bfloat16_is_close_and_restores_the_weights(derivatives: Derivatives) -> None:
    model, batch = tiny.build("llama").to(torch.float32), tiny.examples(40)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    v = tiny.direction(model)
    exact = derivatives(model, batch, v)
    got = derivatives(model, batch, v, dtype=torch.bfloat16)
    assert got.dtype == torch.float32
    assert torch.linalg.norm(got - exact) <= 8 * torch.finfo(torch.bfloat16).eps * torch.linalg.norm(exact)
    assert all(p.dtype == torch.float32 and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_one_copy_of_the_directions_in_the_precision_of_the_run() -> None:
    model = tiny.build("llama", torch.float32)
    passes = DerivativePass(model, [tiny.direction(model)], dtype=torch.bfloat16)
    with passes.running():
        passes(tiny.examples(2))
    for site in passes.capture.sites:
        for (name, dtype), v in site.cast.items():
            assert dtype == torch.bfloat16
            assert v.untyped_storage().data_ptr() == site.directions[name].untyped_storage().data_ptr()


def test_the_model_is_left_as_it_was_found(derivatives: Derivatives) -> None:
    model, batch = tiny.build("llama"), tiny.examples(3)
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        derivatives(model, batch, tiny.direction(model))
    assert modes == [m.training for m in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert model.config._attn_implementation == "oracle"
    assert not any(m._forward_hooks for m in model.modules())


def test_no_weight_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.build("llama"), tiny.examples(3)
    seen: list[bool] = []
    forward = nn.Linear.forward
    monkeypatch.setattr(
        nn.functional,
        "linear",
        lambda x, w, b=None, f=nn.functional.linear: (seen.append(w.requires_grad), f(x, w, b))[1],
    )
    assert nn.Linear.forward is forward
    u2a_fast.directional_derivatives(model, batch, tiny.direction(model), mode="reverse")
    assert seen and not any(seen)


class _Mixing(nn.Linear):
    """A linear layer that also looks at its neighbour: nothing a per-token rule can know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.5 * torch.roll(x, 1, dims=1)


def test_unknown_module_is_named(derivatives: Derivatives) -> None:
    model = tiny.build("llama")
    model.model.layers[1].self_attn.o_proj.__class__ = _Mixing
    with pytest.raises(NotImplementedError, match=r"packed log-probabilities differ"):
        derivatives(model, tiny.examples(2), tiny.direction(model))


def test_unknown_parameter_holder_is_named_unless_left_out() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    config._attn_implementation = "oracle"
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).double()
    v = tiny.direction(model)
    with pytest.raises(NotImplementedError, match=r"\[capture\] model\.layers\.0\.mlp.* is a Mixtral"):
        u2a_fast.directional_derivatives(model, tiny.examples(2), v, mode="reverse")
    kept = {name: d for name, d in v.items() if "mlp" not in name}
    batch = tiny.examples(4)
    got = u2a_fast.directional_derivatives(model, batch, kept, mode="reverse")
    assert relative_error(got, tiny.per_example(model, batch, kept)) <= 1e-10


def test_module_that_is_never_called_is_named() -> None:
    model = tiny.build("llama")
    model.model.layers[0].spare = nn.Linear(3, 3).double()
    with pytest.raises(NotImplementedError, match=r"model\.layers\.0\.spare .* is never called as a module"):
        u2a_fast.directional_derivatives(model, tiny.examples(2), tiny.direction(model), mode="reverse")


def _ok() -> dict[str, list[int]]:
    return {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ([{"input_ids": [1, 2]}], "lacks ['labels']"),
        ([{"labels": [1, 2]}], "lacks ['input_ids']"),
        (
            [_ok(), {"input_ids": [1, 2], "labels": [1]}],
            "expected labels of example 1 to have the length of input_ids, 2, got 1",
        ),
        ([{"input_ids": [1, 2], "labels": [1, -100]}], "example 0 has no scored token"),
        (
            [{"input_ids": [1.5, 2.0], "labels": [1, 2]}],
            "expected input_ids of example 0 to be a flat sequence of ints",
        ),
    ],
)
def test_bad_examples_are_named(batch: list[dict[str, list[int]]], text: str, derivatives: Derivatives) -> None:
    model = tiny.build("llama")
    with pytest.raises(ValueError) as error:
        derivatives(model, batch, tiny.direction(model))
    assert text in str(error.value)


def test_bad_arguments_are_named() -> None:
    model = tiny.build("llama")
    with pytest.raises(ValueError, match=r"\[direction\] expected names of model.named_parameters\(\), got 'nope'"):
        u2a_fast.directional_derivatives(model, [_ok()], {"nope": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"expected lm_head.weight of shape \(61, 32\), got \(2,\)"):
        u2a_fast.directional_derivatives(model, [_ok()], {"lm_head.weight": torch.zeros(2)})
    model.register_parameter("stored", nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False))
    with pytest.raises(ValueError, match=r"expected parameters of floating-point numbers, got stored of torch\.int8"):
        u2a_fast.directional_derivatives(model, [_ok()], {"stored": torch.ones(2)})
    with pytest.raises(ValueError, match='expected "sum" or "mean"'):
        u2a_fast.directional_derivatives(model, [_ok()], {}, reduction="max")
    with pytest.raises(ValueError, match=r"\[mode\] expected one of"):
        u2a_fast.directional_derivatives(model, [_ok()], {}, mode="fast")
    with pytest.raises(TypeError, match="expected a transformers causal LM"):
        u2a_fast.directional_derivatives(nn.Linear(2, 2), [_ok()], {})


def test_no_examples_and_no_direction(derivatives: Derivatives) -> None:
    model = tiny.build("llama")
    assert derivatives(model, [], tiny.direction(model)).shape == (0,)
    assert torch.equal(derivatives(model, [_ok()], {}), torch.zeros(1, dtype=torch.float64))


def test_attention_window_that_a_module_hides_is_refused(derivatives: Derivatives) -> None:
    """GPT-NeoX passes no window to its attention: a config that asks for one must not be ignored."""
    model = tiny.build("gpt-neox")
    model.config.sliding_window = 4
    with pytest.raises(NotImplementedError, match="does not say whether it uses config.sliding_window = 4"):
        derivatives(model, tiny.examples(3), tiny.direction(model))


def test_llama_config_variants(derivatives: Derivatives, true_float64: None) -> None:
    """Attention heads as many as packed tokens, batch of one: axes that could be confused are told apart."""
    config = LlamaConfig(
        **{**tiny.CONFIGS["llama"].to_diff_dict(), "num_attention_heads": 16, "num_key_value_heads": 16}
    )
    config._attn_implementation = "oracle"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double()
    ids = list(range(17))
    batch = [{"input_ids": ids, "labels": ids}]
    v = tiny.direction(model)
    assert relative_error(derivatives(model, batch, v), tiny.per_example(model, batch, v)) <= 1e-10


def test_ids_outside_of_the_vocabulary_are_refused(derivatives: Derivatives) -> None:
    model = tiny.build("llama")
    for ids, text in (([3, 61], "expected input_ids in 0..60, got 3..61"), ([3, -1, 4], "got -1..4")):
        with pytest.raises(ValueError, match=text):
            derivatives(model, [{"input_ids": [*ids, 5], "labels": [-100, *ids]}], {})
    with pytest.raises(ValueError, match="expected labels in 0..60, got 99..99"):
        derivatives(model, [{"input_ids": [3, 4], "labels": [-100, 99]}], {})


def test_reparametrized_weights_are_refused() -> None:
    model = tiny.build("llama-tied")
    nn.utils.weight_norm(model.model.layers[0].mlp.up_proj)
    with pytest.raises(NotImplementedError, match=r"up_proj is a Linear.*weight_g"):
        u2a_fast.directional_derivatives(model, tiny.examples(2), tiny.direction(model), mode="reverse")


def test_changed_outputs_are_refused() -> None:
    model = tiny.build("llama")
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(NotImplementedError, match=r"up_proj \(Linear\) is not what its class computes"):
        u2a_fast.directional_derivatives(model, tiny.examples(2), tiny.direction(model), mode="reverse")


def test_rotary_embeddings_that_depend_on_the_batch_are_refused(derivatives: Derivatives, true_float64: None) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 12}
    sizes = {**tiny.CONFIGS["llama"].to_diff_dict(), "rope_parameters": rope, "max_position_embeddings": 12}
    config = LlamaConfig(**sizes)
    config._attn_implementation = "oracle"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double()
    v = tiny.direction(model)
    short = tiny.examples(5, longest=11)
    got = derivatives(model, short, v)
    assert relative_error(got, tiny.per_example(model, short, v)) <= 1e-10
    ids = list(range(20))
    with pytest.raises(NotImplementedError, match="expected examples of at most 12 tokens, got 20"):
        derivatives(model, [{"input_ids": ids, "labels": ids}], v)


def test_gradient_checkpointing_is_refused_where_it_would_be_wrong(
    derivatives: Derivatives, true_float64: None
) -> None:
    model, batch = tiny.build("llama"), tiny.examples(4)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(NotImplementedError, match="expected gradient checkpointing off"):
        sequence_logprobs(model, batch)
    v = tiny.direction(model)
    got = derivatives(model, batch, v)  # in evaluation mode nothing is repeated
    model.eval()
    assert relative_error(got, tiny.per_example(model, batch, v)) <= 1e-10

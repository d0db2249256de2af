"""Forward mode: prompts shared, modules that only it understands, the choice of the route, batches that do not fit."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

import u2a_fast
from u2a_fast.data.sharing import pack_shared, shared_batches
from u2a_fast.influence.derivatives import DerivativeBatch
from u2a_fast.influence.forward import ForwardPass
from u2a_fast.influence.routes import make_pass, run_batches
from u2a_fast.models.memory import TokenBudget

Rows = list[dict[str, list[int]]]


def answers(count: int, prompt: int, seed: int = 0, *, shared: bool = True) -> Rows:
    """Answers of 1, 2, ... tokens to one prompt, or to a prompt each."""
    generator = torch.Generator().manual_seed(seed)
    out: Rows = []
    for i in range(count):
        generator = generator if not shared else torch.Generator().manual_seed(seed)
        ids = torch.randint(3, tiny.VOCAB, (prompt,), generator=generator).tolist()
        own = torch.randint(3, tiny.VOCAB, (i + 1,), generator=torch.Generator().manual_seed(seed + i + 1)).tolist()
        out.append({"input_ids": ids + own, "labels": [-100] * prompt + own})
    return out


def test_a_shared_prompt_is_packed_once() -> None:
    batch = [*answers(3, 5), *answers(1, 4, seed=7)]
    packed = pack_shared([batch[0], batch[3], batch[1], batch[2]])
    # one prompt of 5 and what each answer adds but its last token (0, 1, 2), then the example of its own (4)
    assert packed.lengths == (5, 0, 1, 2, 4)
    assert packed.parent is not None and packed.parent.tolist() == [-1, 0, 0, 0, -1]
    assert packed.scored == (1, 1, 2, 3)
    assert packed.rows.tolist() == [4, 11, 4, 5, 4, 6, 7]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 0, 1, 2, 3]


def test_nothing_shared_is_plain_packing() -> None:
    batch = answers(4, 5, shared=False)
    shared, plain = pack_shared(batch), u2a_fast.data.packing.pack(batch)
    for name in ("input_ids", "position_ids", "cu_seqlens", "rows", "target", "cu_targets"):
        assert torch.equal(getattr(shared, name), getattr(plain, name))
    assert shared.parent is not None and shared.parent.tolist() == [-1] * 4


def test_batches_count_a_prompt_once_and_repeat_it_where_answers_do_not_fit() -> None:
    batch = [row for i in range(6) for row in (answers(8, 10)[i], answers(8, 10, seed=50)[i])]
    plan = shared_batches(batch, 31)
    assert sorted(i for positions, _ in plan for i in positions) == list(range(12))
    for positions, rows in plan:
        assert rows == [batch[i] for i in positions]
        assert len({tuple(row["input_ids"][:10]) for row in rows}) == 1
    # 10 prompt tokens and answers of 1 to 6 tokens: 1 + 2 + 3 + 4 + 5 + 6 = 21 fit beside them
    assert len(plan) == 2
    assert len(shared_batches(batch, 30)) == 4
    assert plan == shared_batches(batch, 31)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "opt", "gpt-neox"])
def test_shared_prompts_change_no_derivative(family: str) -> None:
    model = tiny.build(family)
    v = tiny.direction(model)
    batch = [*answers(5, 6), *answers(2, 3, seed=9), *tiny.examples(3)]
    with tiny.true_float64():
        got = u2a_fast.directional_derivatives(model, batch, v, mode="forward", token_budget=64)
        want = tiny.per_example(model, batch, v)
    assert (got - want).abs().max() <= 1e-10 * want.abs().max()


def test_hooks_and_experts_are_exact_in_forward_mode() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    config = MixtralConfig(vocab_size=tiny.VOCAB, **sizes, **heads)
    config._attn_implementation, config._experts_implementation = "oracle", "eager"
    torch.manual_seed(0)
    mixture = AutoModelForCausalLM.from_config(config).double()
    hooked = tiny.build("llama")
    hooked.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: 2 * out)
    batch = tiny.examples(4)
    for model in (mixture, hooked):
        v = tiny.direction(model)
        with tiny.true_float64(), torch.enable_grad():
            got = u2a_fast.directional_derivatives(model, batch, v, mode="forward")
            want = tiny.per_example(model, batch, v)
        # the mixture's norms round to float32
        assert (got - want).abs().max() <= (1e-5 if model is mixture else 1e-10) * want.abs().max()


class _NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class _Opaque(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _NoForwardMode.apply(x)


def test_auto_says_what_it_picked_and_why() -> None:
    model, v = tiny.build("llama"), {}
    assert make_pass(model, [v])[1].mode == "forward"
    two = make_pass(model, [v, v])[1]
    assert two.mode == "reverse" and "2 directions" in two.reason
    model.model.layers[1].mlp.act_fn = nn.Sequential(model.model.layers[1].mlp.act_fn, _Opaque())
    v = tiny.direction(model)
    choice = make_pass(model, [v])[1]
    assert choice.mode == "reverse" and "does not run in forward mode" in choice.reason
    with pytest.raises(NotImplementedError, match='does not run in forward mode, use mode="reverse"'):
        make_pass(model, [v], mode="forward")


def test_auto_takes_the_other_route_or_gives_both_reasons() -> None:
    batch, model = tiny.examples(4), tiny.build("llama")
    projection = model.model.layers[1].mlp.up_proj
    projection.register_forward_hook(lambda module, args, out: 2 * out)
    v = tiny.direction(model)
    choice = make_pass(model, [v, v])[1]
    assert choice.mode == "forward" and "[capture]" in choice.reason
    with tiny.true_float64(), torch.enable_grad():
        want = tiny.per_example(model, batch, v)
        for got in u2a_fast.directional_derivatives(model, batch, [v, v]):
            assert (got - want).abs().max() <= 1e-10 * want.abs().max()
    model.model.layers[1].mlp.act_fn = nn.Sequential(model.model.layers[1].mlp.act_fn, _Opaque())
    for directions in ([v], [v, v]):
        with pytest.raises(NotImplementedError, match=r"(?s)(\[capture\].*forward mode|forward mode.*\[capture\])"):
            make_pass(model, directions)


def test_forward_and_reverse_agree_in_half_precision() -> None:
    model, batch = tiny.build("qwen3").to(torch.float32), tiny.examples(24)
    v = tiny.direction(model)
    exact = u2a_fast.directional_derivatives(model, batch, v)
    for mode in ("forward", "reverse"):
        got = u2a_fast.directional_derivatives(model, batch, v, mode=mode, dtype=torch.bfloat16)
        assert torch.linalg.norm(got - exact) <= 8 * torch.finfo(torch.bfloat16).eps * torch.linalg.norm(exact)


class _Small:
    """A pass with memory for ``room`` tokens."""

    def __init__(self, inner: ForwardPass, room: int, error: type[RuntimeError], text: str) -> None:
        self.inner, self.room, self.error, self.text = inner, room, error, text
        self.decoder, self.count, self.double, self.kind = inner.decoder, inner.count, inner.double, inner.kind
        self.batches, self.running = inner.batches, inner.running

    def __call__(self, examples: Sequence[Any]) -> DerivativeBatch:
        if sum(len(example["input_ids"]) for example in examples) > self.room:
            raise self.error(self.text)
        return self.inner(examples)


@pytest.mark.parametrize(
    ("error", "text"),
    [(torch.OutOfMemoryError, "CUDA out of memory"), (RuntimeError, "DefaultCPUAllocator: can't allocate memory")],
)
def test_a_batch_that_does_not_fit_halves_the_budget(error: type[RuntimeError], text: str) -> None:
    model, batch = tiny.build("llama"), tiny.examples(20)
    v = tiny.direction(model)
    passes, budget = ForwardPass(model, [v]), TokenBudget(200)
    small = _Small(passes, 60, error, text)
    with passes.running(), pytest.warns(UserWarning, match="do not fit in memory: going on with 50 tokens a batch"):
        found = budget.fit(small.kind, lambda room: list(run_batches(small, batch, room)))
    got = torch.full((20,), torch.nan, dtype=torch.float64)
    for positions, result in found:
        assert got[positions].isnan().all()
        got[positions] = result.derivatives[0]
    assert budget.found == {"forward pass": 50}
    want = u2a_fast.directional_derivatives(model, batch, v, mode="forward")
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()
    same = u2a_fast.directional_derivatives(model, batch, v, mode="forward", token_budget=50)
    assert torch.equal(got, same)


def test_examples_that_do_not_fit_alone_get_nan_and_are_named() -> None:
    model, batch = tiny.build("llama"), tiny.examples(4)
    passes = ForwardPass(model, [tiny.direction(model)])
    small = _Small(passes, 2, torch.OutOfMemoryError, "CUDA out of memory")
    with passes.running(), pytest.warns(UserWarning, match=r"4 examples do not fit in memory even alone \(example \d"):
        found = TokenBudget(40).fit(small.kind, lambda room: list(run_batches(small, batch, room)))
    for (position,), result in found:
        assert not result.fits and result.derivatives.isnan().all() and result.nll.isnan().all()
        scored = sum(label != -100 for label in batch[position]["labels"][1:])
        assert result.tokens.tolist() == [scored] and result.by_token.shape == (1, scored)


class _Rounded(torch.autograd.Function):
    """x W^T with W stored in 8 bits, and no forward mode, as quantized layers come."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        return x @ (weight.to(x.dtype) * scale).T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return grad @ (weight.to(grad.dtype) * scale), None, None


class _Quantized(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(torch.linspace(-1, 1, self.out_features, dtype=scale.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Rounded.apply(x, self.weight, self.scale) + self.bias


def test_a_quantized_base_runs_in_forward_mode() -> None:
    model, batch = tiny.build("llama"), tiny.examples(5)
    for layer in model.model.layers:
        layer.mlp.down_proj = _Quantized(layer.mlp.down_proj)
        layer.self_attn.q_proj = _Quantized(layer.self_attn.q_proj)
    names = {name for name, p in model.named_parameters() if p.is_floating_point() and "_proj.bias" not in name}
    v = {name: x for name, x in tiny.direction(tiny.build("llama")).items() if name in names}
    passes, choice = make_pass(model, [v])
    assert choice.mode == "forward"
    forward, reverse = (u2a_fast.directional_derivatives(model, batch, v, mode=mode) for mode in ("forward", "reverse"))
    torch.testing.assert_close(forward, reverse, rtol=1e-6, atol=1e-8)
    v |= {name: torch.ones_like(p) for name, p in model.named_parameters() if "_proj.bias" in name}
    got = u2a_fast.directional_derivatives(model, batch, v, mode="forward")
    torch.testing.assert_close(got, tiny.per_example(model, batch, v), rtol=1e-6, atol=1e-8)
    assert all("forward" not in vars(module) for module in model.modules())
    assert "model.layers.0.mlp.down_proj" not in passes.explain()


def test_explains_every_module_of_a_direction() -> None:
    model = tiny.build("llama", torch.float32)
    v = tiny.direction(model)
    forward, reverse = (make_pass(model, [v], mode=mode)[0].explain() for mode in ("forward", "reverse"))
    held = {path for path, module in model.named_modules() if list(module.parameters(recurse=False))}
    gated = {f"model.layers.{i}.mlp" for i in range(2)}
    assert set(reverse) == held and set(forward) == held | gated
    assert forward["model.norm"] == "rms_norm_jvp" and forward["model.layers.0.mlp"] == "glu_jvp"
    assert reverse["model.layers.0.mlp.up_proj"] == "ghost_dot" and reverse["lm_head"] == "linear_logprob_jvp"
    assert make_pass(model, [v], mode="lowrank", rank=3)[0].explain()["lm_head"].endswith("rank 3")
    assert make_pass(model, [v, v])[0].explain()["lm_head"].startswith("ghost_dot")


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


def test_shards_are_refused_by_name(one_rank: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model, batch = tiny.build("llama", torch.float32), tiny.examples(2)
    v = tiny.direction(model)
    fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(NotImplementedError, match="expected whole parameters, got shards"):
        u2a_fast.directional_derivatives(model, batch, v)

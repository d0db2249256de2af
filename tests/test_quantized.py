"""LoRA over a base that bitsandbytes quantized: derivatives of the dequantized weights, on every route.

The truth is float64 autograd of a copy with plain linear layers of the dequantized weights. What needs bitsandbytes is
skipped where it is not installed; 8 bits are tested without it too, by a layer that stores and rounds as LLM.int8 does.
"""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, get_peft_model
from tiny_files import tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import u2a_fast
from u2a_fast.influence.routes import make_pass
from u2a_fast.models.decoder import sequence_logprobs
from u2a_fast.models.loading import load_model
from u2a_fast.models.parameters import evaluation_mode
from u2a_fast.models.quantized import dequantize, dequantized_forwards, is_dequantizable
from u2a_fast.unlearning.measure import nlls

Direction = dict[str, Tensor]
# Sizes that bitsandbytes can pack: outputs by 32, inputs by its blocks of 64
CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    attention_bias=True,
    tie_word_embeddings=False,
)
FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {**FOUR, "bnb_4bit_quant_type": "nf4"},
    "fp4": {**FOUR, "bnb_4bit_quant_type": "fp4"},
    "nf4, scales quantized too": {**FOUR, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 stored as bfloat16": {**FOUR, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}
LOOSE = {"bnb_4bit_quant_type": "nf4", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(checkpoint: Path, options: dict[str, Any]) -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: its quantized layers cannot be made")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**options)
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=config, device_map="cpu", dtype=torch.float32
    )


def adapted(model: Any, *, from_zero: bool = False) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=from_zero, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def along(model: nn.Module) -> Direction:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters() if p.requires_grad}


def plain(model: Any) -> Any:
    return dequantize(copy.deepcopy(model)).double().eval()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def truth(model: Any, batch: list[dict[str, list[int]]], v: Direction) -> Tensor:
    return tiny.per_example(plain(model), batch, {name: x.double() for name, x in v.items()}).detach()


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_dequantizable(module)]


def stored_bytes(model: nn.Module) -> dict[str, Tensor]:
    """As bytes: 4 bits stored as bfloat16 may look like NaN."""
    return {name: p.data.view(torch.uint8) for name, p in model.named_parameters()}


def unpacked(model: nn.Module) -> bool:
    states = (getattr(layer.weight, "quant_state", None) for layer in layers(model))
    return not any(getattr(state, "packing_format_for_cpu", False) for state in states)


@pytest.mark.parametrize("from_zero", [True, False], ids=["B = 0", "B random"])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_both_routes_are_exact_in_the_dequantized_weights(
    checkpoint: Path, options: dict[str, Any], from_zero: bool
) -> None:
    model, batch = adapted(load(checkpoint, options), from_zero=from_zero), tiny.examples(6)
    v = along(model)
    before = copy.deepcopy(stored_bytes(model))
    assert len(layers(model)) == 14 and make_pass(model, [v])[1].mode == "forward"
    want = truth(model, batch, v)
    for mode in ("forward", "reverse"):
        assert relative(u2a_fast.directional_derivatives(model, batch, v, mode=mode), want) <= 1e-5
    double = u2a_fast.directional_derivatives(model, batch, v, dtype=torch.float64)
    assert relative(double, want) <= 1e-6  # norms and softmax stay float32
    assert unpacked(model) and all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(x, before[name]) for name, x in stored_bytes(model).items())


def test_lora_layers_that_stay_as_peft_runs_them_are_not_taken_for_their_base(checkpoint: Path) -> None:
    model, batch = adapted(load(checkpoint, KINDS["nf4"])), tiny.examples(4)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    v = along(model)
    assert any(".other." in name for name in v)
    for mode in ("forward", "reverse"):
        assert relative(u2a_fast.directional_derivatives(model, batch, v, mode=mode), truth(model, batch, v)) <= 1e-5


@pytest.mark.parametrize("options", [KINDS["nf4"], KINDS["int8"]], ids=["nf4", "int8"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_scores_are_those_of_the_dequantized_model(checkpoint: Path, options: dict[str, Any], kind: str) -> None:
    model, rows = adapted(load(checkpoint, options)), tiny.examples(14, seed=3)
    pairs = [{"chosen": a, "rejected": b} for a, b in zip(rows[:4], rows[4:8], strict=True)]
    found = []
    for each in (model, plain(model)):
        objective: Any = u2a_fast.SFT([{"example": row} for row in rows[:8]]) if kind == "sft" else u2a_fast.DPO(pairs)
        found.append(torch.as_tensor(u2a_fast.InfluenceScorer(each, None, objective).score(rows[8:]).score).double())
    assert relative(found[0], found[1]) <= 1e-4
    assert unpacked(model)


def test_a_bfloat16_compute_dtype_rounds_and_is_told_apart_from_an_error(checkpoint: Path) -> None:
    model, batch = adapted(load(checkpoint, LOOSE)), tiny.examples(6)
    v = along(model)
    want = truth(model, batch, v)
    for mode in ("forward", "reverse"):
        error = relative(u2a_fast.directional_derivatives(model, batch, v, mode=mode), want)
        assert 1e-4 < error <= u2a_fast.influence.selftest.BOUNDS[torch.bfloat16]
    report = u2a_fast.selftest(model, batch, dtypes=[torch.float64, torch.float32])
    assert report.healthy and {check.bound for check in report.checks} == {1e-6, 6e-2}


@pytest.mark.parametrize("options", [KINDS["nf4"], KINDS["int8"]], ids=["nf4", "int8"])
def test_selftest_dequantizes_its_truth(checkpoint: Path, options: dict[str, Any]) -> None:
    report = u2a_fast.selftest(adapted(load(checkpoint, options)), dtypes=[torch.float64, torch.float32])
    assert report.healthy and all(check.status == "ok" for check in report.checks)


def test_measuring_before_training_leaves_gradients_right(checkpoint: Path) -> None:
    model, batch = adapted(load(checkpoint, KINDS["nf4"])), tiny.examples(4)
    v = along(model)
    nlls(model, batch, reduction="mean")  # evaluation mode, no gradient: where bitsandbytes would pack
    loss = -sequence_logprobs(model, batch, reduction="mean")
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss.sum(), [named[name] for name in v])
    got = torch.stack([(g * x).sum() for g, x in zip(grads, v.values(), strict=True)]).sum()
    assert relative(got, truth(model, batch, v).sum()) <= 1e-5


def test_packed_weights_are_refused_by_name(checkpoint: Path) -> None:
    model, batch = adapted(load(checkpoint, KINDS["nf4"])), tiny.examples(2)
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer = layers(model)[3]
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    refusal = r"got base_model\.model\.model\.layers\.0\.self_attn\.o_proj\.base_layer packed .* Load the model again"
    for mode in ("auto", "forward", "reverse"):
        with pytest.raises(NotImplementedError, match=refusal):
            u2a_fast.directional_derivatives(model, batch, along(model), mode=mode)
    with pytest.raises(NotImplementedError, match=refusal):
        u2a_fast.SFT([{"example": row} for row in batch]).gradient(model)


def test_8_bits_compute_what_bitsandbytes_trains_on_a_cpu(checkpoint: Path) -> None:
    model = load(checkpoint, KINDS["int8"]).train()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for layer in layers(model)[:4]:
        want = layer(x)
        with evaluation_mode(model):
            got = layer(x)
        assert (got - want).abs().max() <= 16 * torch.finfo(x.dtype).eps * want.abs().max()


@pytest.mark.parametrize("options", [KINDS["nf4"], KINDS["int8"]], ids=["nf4", "int8"])
def test_a_quantized_checkpoint_loads_as_it_was_saved(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    model, batch = load(checkpoint, options), tiny.examples(3)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = adapted(model)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load_model(tmp_path / "base", device="cpu", adapter=tmp_path / "adapter")
    found = [u2a_fast.directional_derivatives(each, batch, along(each)) for each in (model, again)]
    assert len(layers(again)) == 14 and torch.equal(*found)


class Linear8bitLt(nn.Module):
    """What LLM.int8 stores and computes: rows of weight and input rounded to 8 bits, no forward mode."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scales = linear.weight.detach().abs().amax(1)
        stored = (linear.weight.detach() * 127 / scales[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.state = SimpleNamespace(SCB=scales)

    def forward(self, x: Tensor) -> Tensor:
        step = x.detach().abs().amax(-1, keepdim=True) / 127
        w = self.weight * (self.state.SCB / 127)[:, None]
        y = ((x / step).round() * step) @ w.to(x.dtype).T
        return y if self.bias is None else y + self.bias


def eight_bits() -> Any:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(CONFIG)
    for path, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.set_submodule(path, Linear8bitLt(module))
    for p in model.model.parameters():
        p.requires_grad_(False)
    return model.eval()


def test_rounding_of_inputs_is_left_out_on_every_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Linear8bitLt.forward, "__module__", "bitsandbytes.nn.modules")
    model, batch = eight_bits(), tiny.examples(6)
    norms_and_biases = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    for p in norms_and_biases.values():
        p.requires_grad_()
    v = along(model)
    assert any(name.endswith("q_proj.bias") for name in v)
    want = truth(model, batch, v)
    assert relative(u2a_fast.directional_derivatives(model, batch, v, mode="forward"), want) <= 1e-5
    without_biases = {name: x for name, x in v.items() if "proj" not in name}
    got = u2a_fast.directional_derivatives(model, batch, without_biases, mode="reverse")
    assert relative(got, truth(model, batch, without_biases)) <= 1e-5
    assert relative(tiny.per_example(model, batch, v).detach(), want) > 1e-3, "nothing was rounded"


def test_rounding_of_inputs_by_an_unknown_library_is_refused_by_name() -> None:
    model, batch = eight_bits(), tiny.examples(2)
    assert dequantized_forwards(model) == []
    v = {name: torch.ones_like(p) for name, p in model.named_parameters() if name.endswith("norm.weight")}
    with pytest.raises(NotImplementedError, match="expected quantized layers that are linear .* got a Linear8bitLt"):
        u2a_fast.directional_derivatives(model, batch, v, mode="forward")
    with pytest.raises(ValueError, match=r"or layers of bitsandbytes, got the quantized model\.layers\.0"):
        u2a_fast.selftest(model, batch)

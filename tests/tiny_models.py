"""Tiny causal LMs of many families, built from configs, with every parameter away from its special initial value."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

VOCAB = 61
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GATED = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
_WIDE_HEADS = {**_GATED, "head_dim": 16}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_GATED, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**_GATED, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**_GATED, sliding_window=5),
    "qwen2": Qwen2Config(**_GATED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_WIDE_HEADS, tie_word_embeddings=False),
    "gemma": GemmaConfig(**_WIDE_HEADS),
    "gemma2": Gemma2Config(**_WIDE_HEADS, sliding_window=5, query_pre_attn_scalar=16, final_logit_softcapping=3.0),
    "gemma3": Gemma3TextConfig(**_WIDE_HEADS, sliding_window=5, query_pre_attn_scalar=16),
    "phi": PhiConfig(**_GATED, qk_layernorm=True, partial_rotary_factor=0.5),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1
    ),
    "opt": OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=16, dropout=0.0),
    "gpt-neox": GPTNeoXConfig(**_SIZES, intermediate_size=48),
}


def _exact_norm(module: Any, x: Tensor) -> Tensor:
    return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


@contextmanager
def true_float64() -> Iterator[None]:
    """Norms in the model's own precision: families compute them in float32 even in a float64 model, and where values
    and tangents are rounded apart, nothing agrees beyond 1e-7."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        stack.enter_context(mock.patch.object(torch, "float", torch.float64))
        for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
            stack.enter_context(mock.patch.object(norm, "forward", _exact_norm))
        yield


def _oracle_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention with the mask that transformers builds, softmax in the inputs' precision (eager's is float32)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scaling = options.get("scaling")
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if (softcap := options.get("softcap")) is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return ((logits + mask).softmax(-1) @ v).transpose(1, 2).contiguous(), None


AttentionInterface.register("oracle", _oracle_attention)
AttentionMaskInterface.register("oracle", eager_mask)


def build(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[family])
    config._attn_implementation = "oracle"
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def examples(count: int, seed: int = 0, longest: int = 17, vocab: int = VOCAB) -> list[dict[str, list[int]]]:
    """Ragged examples: an unscored prompt, a scored answer, sometimes a hole in it or an unscored tail."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        length = int(torch.randint(2, longest + 1, (), generator=generator))
        prompt = int(torch.randint(0, length, (), generator=generator))
        ids = torch.randint(3, vocab, (length,), generator=generator)
        labels = ids.clone()
        labels[: min(prompt, length - 1)] = -100
        if i % 3 == 0 and length - prompt > 3:
            labels[-2] = -100
        if i % 4 == 1 and length - prompt > 3:
            labels[-1] = -100
        out.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return out


def direction(model: nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in model.named_parameters()}


def own_nll(model: nn.Module, example: dict[str, list[int]], reduction: str = "mean") -> torch.Tensor:
    """The model's own loss on one example alone, by plain transformers and PyTorch."""
    ids, labels = torch.tensor(example["input_ids"]), torch.tensor(example["labels"])
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction=reduction)


def per_example(
    model: nn.Module, batch: list[dict[str, list[int]]], v: dict[str, torch.Tensor], reduction: str = "mean"
) -> torch.Tensor:
    """<v, grad NLL_i> one example at a time through autograd."""
    parameters = [p for name, p in model.named_parameters() if name in v]
    directions = [v[name] for name, _ in model.named_parameters() if name in v]
    out = []
    for example in batch:
        grads = torch.autograd.grad(own_nll(model, example, reduction), parameters, allow_unused=True)
        out.append(sum((g * d).sum() for g, d in zip(grads, directions, strict=True) if g is not None))
    return torch.stack(out)

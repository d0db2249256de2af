"""Models and examples that scoring is measured on: a random Llama, and the real HH negatives where they are."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks import ROOT
from u2a_fast.data.packing import IGNORE_INDEX

__all__ = ["HH_TOKENS", "TokenExample", "Workload", "hh", "hh_missing", "llama", "random_examples", "random_llama"]

SHARED = ROOT.parent / "shared"
HH_MODEL, HH_DATA = SHARED / "models" / "hh-tiny", SHARED / "data" / "hh-harmless"
HH_TOKENS = 256  # the most that the public procedure takes of an example, and what it pads to

TokenExample = dict[str, list[int]]


@dataclass
class Workload:
    """A model in evaluation mode, the examples to score and others to take a direction from."""

    name: str
    model: nn.Module
    examples: list[TokenExample]
    others: list[TokenExample]

    def direction(self) -> dict[str, Tensor]:
        """The gradient of the mean answer NLL of ``others``, by parameter name."""
        self.model.requires_grad_(True)
        for example in self.others:
            ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))
            (self.model(input_ids=ids, labels=labels, use_cache=False).loss / len(self.others)).backward()
        found = {}
        for name, p in self.model.named_parameters():
            assert p.grad is not None
            found[name], p.grad = p.grad, None
        return found


def random_llama(
    *, hidden: int, layers: int, ffn: int, heads: int, vocabulary: int, kv_heads: int | None = None
) -> nn.Module:
    """A Llama with tied embeddings and random weights, float32, the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def random_examples(count: int, *, tokens: int, vocabulary: int, seed: int) -> list[TokenExample]:
    """Random ids of which the model sees ``tokens`` and the last half is scored."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        ids = torch.randint(vocabulary, (tokens + 1,), generator=generator).tolist()
        prompt = tokens + 1 - tokens // 2
        examples.append({"input_ids": ids, "labels": [IGNORE_INDEX] * prompt + ids[prompt:]})
    return examples


def llama(
    count: int = 64,
    *,
    tokens: int = 128,
    hidden: int = 384,
    layers: int = 8,
    ffn: int = 1024,
    heads: int = 6,
    vocabulary: int = 16000,
) -> Workload:
    """A random Llama, of 20 million parameters by default, and examples whose answer is their second half."""
    model = random_llama(hidden=hidden, layers=layers, ffn=ffn, heads=heads, vocabulary=vocabulary)
    return Workload(
        "llama",
        model,
        random_examples(count, tokens=tokens, vocabulary=vocabulary, seed=1),
        random_examples(16, tokens=tokens, vocabulary=vocabulary, seed=2),
    )


def hh_missing() -> str | None:
    """Why the HH workload cannot run here, or None."""
    absent = [path.name for path in (HH_MODEL, HH_DATA) if not path.exists()]
    return f"{' and '.join(absent)} not found in the folder 'shared' beside the checkout" if absent else None


def hh(count: int = 200) -> Workload:
    """hh-tiny and the first ``count`` HH negatives, <eos> prompt ' ' response <eos>, the last 256 tokens of each."""
    model = AutoModelForCausalLM.from_pretrained(HH_MODEL).eval()
    tokenizer = AutoTokenizer.from_pretrained(HH_MODEL)
    negatives, positives = (_read(HH_DATA / f"{name}.jsonl") for name in ("negatives", "positives"))
    examples = [_tokenize(tokenizer, row) for row in islice(negatives, count)]
    # Positives of other prompts than those that are scored, as a preference set is.
    others = [_tokenize(tokenizer, row) for row in islice(positives, count, count + 64)]
    return Workload("hh", model, examples, others)


def _read(path: Path) -> Iterable[dict[str, Any]]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def _tokenize(tokenizer: Any, row: dict[str, Any]) -> TokenExample:
    eos = tokenizer.eos_token_id
    prompt = [eos, *tokenizer(row["prompt"], add_special_tokens=False).input_ids]
    answer = [*tokenizer(" " + row["response"], add_special_tokens=False).input_ids, eos]
    labels = [IGNORE_INDEX] * len(prompt) + answer
    return {"input_ids": (prompt + answer)[-HH_TOKENS:], "labels": labels[-HH_TOKENS:]}

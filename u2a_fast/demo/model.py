"""The demo's model: a tiny Llama trained on the spot on good and bad answers alike: it has something to unlearn."""

import random

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from u2a_fast.data.packing import Example
from u2a_fast.models.decoder import sequence_logprobs

__all__ = ["make_model", "make_tokenizer", "train"]


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of exactly these words, with padding, end-of-text and unknown tokens of its own."""
    special = ["<pad>", "<eos>", "<unk>"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=128
    )


def make_model(vocab_size: int, seed: int) -> LlamaForCausalLM:
    """A two-layer Llama of about 0.1 million parameters, its initial values drawn from ``seed`` alone."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    examples: list[Example],
    *,
    seed: int,
    epochs: int,
    batch: int = 32,
    learning_rate: float = 3e-3,
) -> float:
    """AdamW on the mean answer NLL, linear decay to zero; returns the mean NLL a token of the last epoch, in nats."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    steps = epochs * -(-len(examples) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    rng = random.Random(f"training-{seed}")
    order = list(range(len(examples)))
    model.train()
    for _ in range(epochs):
        rng.shuffle(order)
        total = 0.0
        for start in range(0, len(order), batch):
            part = [examples[i] for i in order[start : start + batch]]
            loss = -sequence_logprobs(model, part, reduction="mean").mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(part)
    model.eval()
    return total / len(order)

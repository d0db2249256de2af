"""A byte-level tokenizer and a two-layer Llama, built on the spot: what the tests of files and commands run on."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(
    *, bos: str | None = None, pad: str | None = "<pad>", eos: str = "<eos>", adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """Bytes and a few specials; ``pad`` may be None or equal to ``eos``."""
    specials = list(dict.fromkeys(["<pad>", "<eos>", "<bos>"]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocab["<bos>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad)


def tiny_model(seed: int = 0, context: int = 128) -> LlamaForCausalLM:
    """Two layers of width 32, untrained."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny_model(folder: Path, **tokenizer_options: str | bool | None) -> Path:
    """Model and tokenizer as ``from_pretrained`` finds them."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(**tokenizer_options).save_pretrained(folder)  # type: ignore[arg-type]
    return folder

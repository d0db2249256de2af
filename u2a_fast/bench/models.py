"""The layer sizes of well-known models, or of any config.json: what ``--like`` times.

A model is built from its config without memory (on PyTorch's meta device), so that its layers are what the architecture
has, fused or not, rather than what a rule about configs says.
"""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from u2a_fast.models.kinds import Kind, kind_of

__all__ = ["MODELS", "Layer", "build", "layers", "model_config"]

_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def _entry(model_type: str, sizes: tuple[int, ...], *, tied: bool = True, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, **dict(zip(_FIELDS, sizes, strict=True)), "tie_word_embeddings": tied, **more}


def _pythia(hidden: int, layers: int, heads: int, vocabulary: int = 50304) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    return {"model_type": "gpt_neox", **sizes, "num_attention_heads": heads, "vocab_size": vocabulary}


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": hidden, "n_layer": layers, "n_head": heads}


_GEMMA2: dict[str, Any] = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}

# By hub name, from the config.json published there; the tests hold their parameter counts against the published ones.
MODELS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.2-1B": _entry("llama", (2048, 8192, 16, 32, 8, 64, 128256)),
    "meta-llama/Llama-3.2-3B": _entry("llama", (3072, 8192, 28, 24, 8, 128, 128256)),
    "meta-llama/Llama-3.1-8B": _entry("llama", (4096, 14336, 32, 32, 8, 128, 128256), tied=False),
    "Qwen/Qwen2.5-0.5B": _entry("qwen2", (896, 4864, 24, 14, 2, 64, 151936)),
    "Qwen/Qwen2.5-1.5B": _entry("qwen2", (1536, 8960, 28, 12, 2, 128, 151936)),
    "Qwen/Qwen2.5-3B": _entry("qwen2", (2048, 11008, 36, 16, 2, 128, 151936)),
    "Qwen/Qwen2.5-7B": _entry("qwen2", (3584, 18944, 28, 28, 4, 128, 152064), tied=False),
    "Qwen/Qwen3-0.6B": _entry("qwen3", (1024, 3072, 28, 16, 8, 128, 151936)),
    "Qwen/Qwen3-1.7B": _entry("qwen3", (2048, 6144, 28, 16, 8, 128, 151936)),
    "Qwen/Qwen3-4B": _entry("qwen3", (2560, 9728, 36, 32, 8, 128, 151936)),
    "Qwen/Qwen3-8B": _entry("qwen3", (4096, 12288, 36, 32, 8, 128, 151936), tied=False),
    "mistralai/Mistral-7B-v0.1": _entry("mistral", (4096, 14336, 32, 32, 8, 128, 32000), tied=False),
    "mistralai/Mistral-7B-v0.3": _entry(
        "mistral", (4096, 14336, 32, 32, 8, 128, 32768), tied=False, sliding_window=None
    ),
    "google/gemma-2-2b": _entry("gemma2", (2304, 9216, 26, 8, 4, 256, 256000), **_GEMMA2),
    "google/gemma-2-9b": _entry("gemma2", (3584, 14336, 42, 16, 8, 256, 256000), **_GEMMA2),
    "google/gemma-3-270m": _entry("gemma3_text", (640, 2048, 18, 4, 1, 256, 262144)),
    "google/gemma-3-1b-pt": _entry("gemma3_text", (1152, 6912, 26, 4, 1, 256, 262144)),
    "google/gemma-3-4b-pt": _entry("gemma3_text", (2560, 10240, 34, 8, 4, 256, 262208)),
    "EleutherAI/pythia-70m": _pythia(512, 6, 8),
    "EleutherAI/pythia-160m": _pythia(768, 12, 12),
    "EleutherAI/pythia-410m": _pythia(1024, 24, 16),
    "EleutherAI/pythia-1b": _pythia(2048, 16, 8),
    "EleutherAI/pythia-1.4b": _pythia(2048, 24, 16),
    "EleutherAI/pythia-2.8b": _pythia(2560, 32, 32),
    "EleutherAI/pythia-6.9b": _pythia(4096, 32, 32, 50432),
    "openai-community/gpt2": _gpt2(768, 12, 12),
    "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
    "openai-community/gpt2-large": _gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
    "HuggingFaceTB/SmolLM2-135M": _entry("llama", (576, 1536, 30, 9, 3, 64, 49152)),
    "HuggingFaceTB/SmolLM2-360M": _entry("llama", (960, 2560, 32, 15, 5, 64, 49152)),
    "HuggingFaceTB/SmolLM2-1.7B": _entry("llama", (2048, 8192, 24, 32, 32, 64, 49152)),
}
_SUFFIXES = ("-instruct", "-it", "-pt", "-base", "-chat", "-deduped")


@dataclass(frozen=True)
class Layer:
    """What ops are called on in a model: letters to sizes (I and O; D and V; H, G, E and F), and options of the op."""

    sizes: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)


def _short(name: str) -> str:
    """A hub name without its organization, its capitals and what tunings append."""
    short = name.rpartition("/")[2].lower()
    for suffix in _SUFFIXES:
        short = short.removesuffix(suffix)
    return short.replace("smollm-", "smollm2-")  # both have the same sizes


def model_config(like: str) -> Any:
    """The transformers config of a name in MODELS (organization, capitals and -Instruct left out at will) or of a
    config.json or its folder. ValueError where it is none of these."""
    path = Path(like)
    if path.exists():
        return _from_file(path / "config.json" if path.is_dir() else path)
    names = {_short(name): name for name in MODELS}
    if _short(like) not in names:
        close = difflib.get_close_matches(_short(like), names, n=3, cutoff=0.5)
        known = ", ".join(names[name] for name in close) or ", ".join(MODELS)
        raise ValueError(f"[bench] expected --like as a known model ({known}) or a path of a config.json, got {like!r}")
    return _config(MODELS[names[_short(like)]], like)


def _from_file(path: Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"[bench] expected a config.json in {path}, got {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ValueError(f"[bench] expected a model_type in {path}, got {type(content).__name__} without one")
    return _config(content, str(path))


def _config(content: dict[str, Any], origin: str) -> Any:
    values = {name: value for name, value in content.items() if name != "model_type"}
    try:
        return AutoConfig.for_model(content["model_type"], **values).get_text_config()
    except (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).partition(" Should contain")[0].split())
        raise ValueError(f"[bench] expected a config that transformers can read in {origin}, got: {reason}") from None


def build(config: Any) -> PreTrainedModel:
    """The causal LM of a config with no memory behind its weights. ValueError where transformers has none for it."""
    config._attn_implementation = "eager"  # whatever the config asks for: nothing is computed
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"[bench] expected the config of a causal language model, got: {reason}") from None


def layers(config: Any) -> list[Layer]:
    """The distinct sizes that a model has: its linear layers in order of appearance, its head, its attention."""
    model = build(config)
    head = model.get_output_embeddings()
    found = [Layer({"I": i, "O": o}) for i, o in dict.fromkeys(_linear_sizes(model, head))]
    if head is not None:
        vocabulary, hidden = head.get_parameter("weight").shape
        softcap = getattr(config, "final_logit_softcapping", None) or 0.0
        found.append(Layer({"D": hidden, "V": vocabulary}, {"softcap": float(softcap)}))
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, int):
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        softcap = float(getattr(config, "attn_logit_softcapping", None) or 0)
        for window in _windows(config):
            found.append(Layer({"H": heads, "G": groups, "E": size, "F": size}, {"window": window, "softcap": softcap}))
    return found


def _windows(config: Any) -> list[int]:
    """The distinct sliding windows of a model's attention, 0 for none."""
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    return list(dict.fromkeys(window if kind == "sliding_attention" else 0 for kind in kinds))


def _linear_sizes(model: nn.Module, head: nn.Module | None) -> Iterator[tuple[int, int]]:
    for module in model.modules():
        kind = kind_of(module)
        if module is not head and kind in (Kind.LINEAR, Kind.CONV1D):
            rows, columns = module.get_parameter("weight").shape
            yield (rows, columns) if kind is Kind.CONV1D else (columns, rows)

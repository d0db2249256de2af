"""Models from a folder or the hub, with clear words where something is missing."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

__all__ = ["context_length", "load_model", "load_tokenizer", "model_files", "resolve_device"]

ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NO_LIMIT = 10**9  # tokenizers without a limit state a huge one


def load_model(
    path_or_name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    adapter: str | Path | None = None,
) -> tuple[nn.Module, Any]:
    """A causal LM in evaluation mode and its tokenizer.

    path_or_name: a folder written by ``save_pretrained`` (of a model, or of a PEFT adapter, whose base is then loaded
    too) or a hub name. device: None for CUDA where there is one, else the CPU. dtype: "auto" for the checkpoint's own,
    "float32", "bfloat16", "float16", "float64" or a torch.dtype. adapter: a PEFT adapter folder put on top, trainable.
    Raises FileNotFoundError for a path that does not exist, ValueError for one that is no model or has no tokenizer.
    """
    place = resolve_device(device)
    name = _check_location(path_or_name, "model")
    base = name
    if (Path(name) / ADAPTER_CONFIG).is_file():
        if adapter is not None:
            raise ValueError(f"[model] expected a base model below the adapter {adapter}, got the adapter {name}")
        base, adapter = _adapter_base(name), name
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(base, dtype=_dtype(dtype), output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = "" if Path(base).is_dir() else " (no such folder, so taken for a hub name)"
        raise ValueError(f"[model] {base}{where} cannot be loaded as a causal LM: {_first_line(error)}") from error
    model: nn.Module = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ValueError(f"[model] {base} lacks {len(missing)} weights of a {type(model).__name__}: {missing[0]}, ...")
    tokenizer = load_tokenizer(name)
    _check_vocabulary(model, tokenizer)
    if adapter is not None:
        model = _with_adapter(model, _check_location(adapter, "adapter"))
    return model.to(place).eval(), tokenizer


def _check_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer's own tokens, additions that data may never hold aside, lack embeddings."""
    rows = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    needed = max([tokenizer.vocab_size - 1, *(i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id) if i)]) + 1
    if needed > rows:
        raise ValueError(f"[model] expected embeddings for the tokenizer's {needed} tokens, got {rows}")


def load_tokenizer(path_or_name: str | Path) -> Any:
    """The tokenizer of a model folder or hub name; of an adapter without one, its base's. ValueError for none."""
    name = _check_location(path_or_name, "model")
    if (Path(name) / ADAPTER_CONFIG).is_file() and not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
        name = _adapter_base(name)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"[model] no tokenizer found in {name} (looked for {' or '.join(TOKENIZER_FILES)}): {_first_line(error)}"
        ) from error


def context_length(model_or_name: nn.Module | str | Path, tokenizer: Any) -> int | None:
    """The most tokens that both the model's positions and the tokenizer admit; None where neither has a limit."""
    config: Any
    if isinstance(model_or_name, nn.Module):
        config = model_or_name.config
    else:
        folder = Path(model_or_name)
        is_adapter = (folder / ADAPTER_CONFIG).is_file()
        config = _config(_adapter_base(str(folder)) if is_adapter else str(model_or_name))
    text_config = config.get_text_config()
    limits = [getattr(text_config, "max_position_embeddings", None), tokenizer.model_max_length]
    known = [limit for limit in limits if limit is not None and 0 < limit < NO_LIMIT]
    return min(known, default=None)


def _config(name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"[model] {name} has no usable config.json: {_first_line(error)}") from error


def model_files(*paths_or_names: str | Path | None) -> list[Path]:
    """The local folders among models and adapters, whose files make them; none for a hub name or None."""
    return [Path(p) for p in paths_or_names if p is not None and Path(p).is_dir()]


def _check_location(path_or_name: str | Path, what: str) -> str:
    path = Path(path_or_name).expanduser()
    marker = ADAPTER_CONFIG if what == "adapter" else "config.json"
    if path.is_dir():
        if not (path / marker).is_file() and not (path / ADAPTER_CONFIG).is_file():
            raise ValueError(f"[{what}] expected a model folder, got {path} without {marker}")
        return str(path)
    if path.exists():
        raise ValueError(f"[{what}] expected a model folder or a hub name, got the file {path}")
    if isinstance(path_or_name, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path_or_name):
        raise FileNotFoundError(f"[{what}] no such folder: {path} (looked for {path.absolute() / marker})")
    return path_or_name


def _adapter_base(folder: str) -> str:
    # PEFT is needed by adapters alone and takes seconds to import.
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if not base:
        raise ValueError(f"[model] the adapter {folder} names no base model: give the base as model and it as adapter")
    return _check_location(base, "model")


def _with_adapter(model: nn.Module, folder: str) -> nn.Module:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"[adapter] {folder} cannot be put on this model: {_first_line(error)}") from error


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device that was named; None: CUDA where there is one, else the CPU. ValueError for one that is not here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f'[model] expected device such as "cpu" or "cuda:0", got {device!r}') from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"[model] expected one of {torch.cuda.device_count()} CUDA devices, got {device!r}")
    return place


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    known = {str(t).removeprefix("torch."): t for t in DTYPES}
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in known:
        raise ValueError(f"[model] expected dtype out of {['auto', *known]}, got {dtype!r}")
    return known[dtype]


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

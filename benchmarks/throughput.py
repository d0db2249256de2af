"""Tokens that scoring takes a second on one device: a model of random weights, of the shape of a known one.

    python -m benchmarks.throughput [--like meta-llama/Llama-3.2-1B] [--device cuda] [--layers N] [--out rows.jsonl]

Examples of ``--tokens`` tokens whose second half is scored, ``--batch`` of them at a time, in bfloat16. The routes and
a plain forward pass with the LM head on every token (the unit) take turns. The gate, in the same process and on the
same device: on the model cut to two layers, float32 derivatives of both routes agree with per-example autograd in
float64 to 1e-4, and those of bfloat16 to 6e-2 of their norm.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/throughput.py`

from benchmarks.baselines import GateError, attempt, float64_scores, forward_full_head, norm_error, score_error
from benchmarks.workloads import random_examples
from u2a_fast.bench.models import model_config
from u2a_fast.bench.rows import Row, make_row, write_rows
from u2a_fast.bench.timing import Spread, alternate, ratios
from u2a_fast.data.packing import Example
from u2a_fast.influence.routes import make_pass
from u2a_fast.models.decoder import Decoder

__all__ = ["main", "measure"]

ROUTES = ("forward", "reverse")
AGREEMENT, HALF_AGREEMENT = 1e-4, 6e-2
GEMM = {"cuda": 8192, "cpu": 1024}  # rows of the square product
GATE_LAYERS, GATE_EXAMPLES, GATE_TOKENS = 2, 4, 32


def _model(config: Any, layers: int | None, dtype: torch.dtype, device: str) -> nn.Module:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def _direction(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(p) * 0.01 for name, p in model.named_parameters()}


def _gate(config: Any, device: str) -> str:
    """What the derivatives are worth on two layers; GateError where they are wrong."""
    model = _model(config, GATE_LAYERS, torch.float32, device)
    v = _direction(model)
    examples = random_examples(GATE_EXAMPLES, tokens=GATE_TOKENS, vocabulary=config.vocab_size, seed=1)
    exact = float64_scores(model, v, examples)

    def worst(dtype: torch.dtype, error: Callable[[Tensor, Tensor], float]) -> float:
        errors = []
        for mode in ROUTES:
            passes, _ = make_pass(model, [v], mode=mode, dtype=dtype)
            with passes.running():
                errors.append(error(passes(examples).derivatives[0], exact))
        return max(errors)

    single, half = worst(torch.float32, score_error), worst(torch.bfloat16, norm_error)
    if not (single <= AGREEMENT and half <= HALF_AGREEMENT):
        raise GateError(f"derivatives of two layers differ from float64 autograd by {single:.1e} and {half:.1e}")
    return (
        f"on two layers float32 within {single:.1e} (relative) of float64 autograd, "
        f"bfloat16 within {half:.1e} of their norm"
    )


def forward_flops(config: Any, layers: int, decoder: Decoder, examples: Sequence[Example]) -> float:
    """Of a forward pass's products: linear layers, causal attention, the head on scored tokens."""
    packed = decoder.pack(examples)
    blocks = [m for name, m in decoder.model.named_modules() if isinstance(m, nn.Linear) and name != decoder.head_path]
    head = decoder.head_module.weight.numel()
    pairs = sum(len(example["input_ids"]) ** 2 / 2 for example in examples)
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = 4.0 * pairs * width * layers
    tokens = sum(len(example["input_ids"]) for example in examples)
    return 2.0 * tokens * sum(m.weight.numel() for m in blocks) + attention + 2.0 * len(packed.target) * head


def _share(flops: float, seconds: list[float], gemm: list[float], n: int) -> Spread:
    """The rate over that of a square product of n rows."""
    return Spread.of([flops / own / (2 * n**3 / base) for own, base in zip(seconds, gemm, strict=True)])


def measure(
    like: str, device: str, *, tokens: int = 512, batch: int = 32, rounds: int = 3, layers: int | None = None
) -> Row:
    """A row of tokens a second and units of the routes that run: one may lack the memory.

    Raises:
        GateError: the derivatives are wrong.
        ValueError: ``like`` names no model.
    """
    config = model_config(like)
    gate = _gate(config, device)
    model = _model(config, layers, torch.bfloat16, device)
    examples = random_examples(batch, tokens=tokens, vocabulary=config.vocab_size, seed=2)
    decoder = Decoder(model)
    v = _direction(model)

    def unit(_: int) -> object:
        return forward_full_head(decoder, examples)

    square = torch.randn(*(GEMM[device],) * 2, device=device, dtype=torch.bfloat16)

    def timed(mode: str) -> dict[str, list[float]]:
        passes, _ = make_pass(model, [v], mode=mode)
        tasks = {"unit": unit, "scoring": lambda _: passes(examples), "gemm": lambda _: square @ square}
        with passes.running():
            return alternate(tasks, rounds=rounds, device=device)

    # One after the other: each holds a copy of the direction.
    flops = 3 * forward_flops(config, layers or config.num_hidden_layers, decoder, examples)
    found = {mode: attempt(f"{like} {mode}", partial(timed, mode)) for mode in ROUTES}
    seconds = {mode: times for mode, times in found.items() if times}
    values = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": layers or config.num_hidden_layers,
        "tokens": tokens,
        "batch": batch,
        "tokens_per_second": {mode: tokens * batch / Spread.of(t["scoring"]).p50 for mode, t in seconds.items()},
        "units": {mode: ratios(t["scoring"], t["unit"]).to_list() for mode, t in seconds.items()},
        "of_gemm": {mode: _share(flops, t["scoring"], t["gemm"], len(square)).to_list() for mode, t in seconds.items()},
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
    }
    name = like.rpartition("/")[2] + (f"-{layers}layers" if layers else "")
    return make_row("throughput", f"{name}-{device}", values, gate=gate, device=device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if the gate failed or a route did not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--like", default="meta-llama/Llama-3.2-1B", help="a name of u2a_fast.bench.models, or a config"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--layers", type=int, help="of the model's, all by default")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32, help="examples a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="merge the row into this file")
    options = parser.parse_args(argv)
    try:
        row = measure(
            options.like,
            options.device,
            tokens=options.tokens,
            batch=options.batch,
            rounds=options.rounds,
            layers=options.layers,
        )
    except GateError as error:
        print(f"GATE FAILED, not timed: {error}")
        return 1
    print(f"{row['case']}: {row['parameters'] / 1e9:.2f} G parameters; {row['gate']}")
    for mode, rate in row["tokens_per_second"].items():
        p20, p50, p80 = row["units"][mode]
        share = row["of_gemm"][mode][1]
        print(f"  {mode:<8} {rate:,.0f} tokens/s, {p50:.2f} units ({p20:.2f} to {p80:.2f}), {share:.0%} of the product")
    if options.out and row["units"]:
        write_rows(options.out, [row])
    return int(len(row["units"]) < len(ROUTES))


if __name__ == "__main__":
    raise SystemExit(main())

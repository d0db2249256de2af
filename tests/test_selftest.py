"""The self-test finds errors that rounding does not explain, and no others."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from tiny_files import save_tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig
from typer.testing import CliRunner

import u2a_fast
from u2a_fast import selftest
from u2a_fast.cli import app
from u2a_fast.influence import selftest as module
from u2a_fast.models.contractions import Site
from u2a_fast.models.decoder import Decoder
from u2a_fast.models.tiled_head import TiledHead


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_routes_and_precisions(family: str) -> None:
    model = tiny.build(family).float()
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = selftest(model, count=9)
    assert report.healthy and (report.examples, report.parameters) == (9, sum(p.numel() for p in model.parameters()))
    assert [(c.dtype, c.route) for c in report.checks] == [
        (dtype, route) for dtype in ("float32", "bfloat16") for route in ("forward", "reverse", "reverse x 2")
    ]
    for check in report.checks:
        eps = torch.finfo(getattr(torch, check.dtype)).eps
        assert eps / 100 < check.relative_error <= check.bound
        assert check.spearman is not None and check.spearman > (0.99 if check.dtype == "float32" else 0.9)
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())


def test_a_wrong_contraction_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer's direction a hundredth too long: below what bfloat16 could show, far above float32's rounding."""
    direction = Site.direction

    def wrong(site: Site, name: str, dtype: torch.dtype) -> torch.Tensor:
        return direction(site, name, dtype) * (1.01 if site.path.endswith("0.mlp.up_proj") else 1)

    monkeypatch.setattr(Site, "direction", wrong)
    report = selftest(tiny.build("llama").float(), tiny.examples(4), dtypes=[torch.float32])
    assert [(c.route, c.status) for c in report.checks] == [
        ("forward", "ok"),
        ("reverse", "fail"),
        ("reverse x 2", "fail"),
    ]
    assert not report.healthy and report.checks[0].spearman is None


def test_what_only_several_directions_or_shared_prompts_run_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    model, propagate = tiny.build("llama").float(), TiledHead.propagate

    def wrong(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logp, grad_h, products = propagate(*arguments)
        return logp, grad_h, 1.5 * products

    with monkeypatch.context() as patch:
        patch.setattr(TiledHead, "propagate", wrong)
        statuses = [check.status for check in selftest(model, dtypes=[torch.float32]).checks]
        assert statuses == ["ok", "ok", "fail"]
    decoder = Decoder(model)
    examples = module.random_examples(decoder, 8)
    assert len(decoder.pack(examples, shared=True).input_ids) < len(decoder.pack(examples).input_ids)


def test_experts_are_tested_by_the_forward_route() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 2}
    config = MixtralConfig(vocab_size=tiny.VOCAB, num_attention_heads=4, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    mixture = AutoModelForCausalLM.from_config(config).float()
    by_default = selftest(mixture, count=2, dtypes=[torch.float32])
    assert [check.status for check in by_default.checks] == ["skipped"] * 3
    mixture.set_experts_implementation("eager")
    forward, *others = selftest(mixture, count=2, dtypes=[torch.float32]).checks
    assert forward.status == "ok" and all("MixtralTopKRouter" in str(check.detail) for check in others)


def test_a_route_that_the_model_does_not_allow_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama").float()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: 2 * out)
    forward, reverse, two = selftest(model, count=3, dtypes=[torch.float32]).checks
    assert forward.status == "ok" and reverse.status == two.status == "skipped"
    assert "up_proj" in str(reverse.detail) and reverse.relative_error is None

    def refuse(*args: object, **options: object) -> None:
        raise NotImplementedError("[model] not understood")

    monkeypatch.setattr(module, "directional_derivatives", refuse)
    assert not selftest(model, count=3, dtypes=[torch.float32]).healthy, "nothing was tested"


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama").float()
    with pytest.raises(ValueError, match="expected a count of at least 1, got 0"):
        selftest(model, count=0)
    with pytest.raises(ValueError, match=r"expected dtypes out of .* got torch\.int8"):
        selftest(model, dtypes=[torch.int8])
    needed = 8 * 3 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(module, "_free_memory", lambda device: needed - 1)
    with pytest.raises(MemoryError, match="GiB of free memory on cpu for a float64 copy"):
        selftest(model)
    monkeypatch.setattr(module, "_free_memory", lambda device: needed)
    assert selftest(model, count=1, dtypes=[torch.float32]).healthy
    model.model.norm.weight = nn.Parameter(torch.ones(32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"got the quantized model\.norm\.weight"):
        selftest(model)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_model(tmp_path / "model")
    rows = [{"prompt": f"q {i}", "response": f"no {i}"} for i in range(5)]
    negatives = tmp_path / "negatives.jsonl"
    negatives.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*more: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["selftest", "--model", str(folder), *more])
        return result.exit_code, result.output

    code, output = run("--negatives", str(negatives), "--examples", "3", "--json")
    report = json.loads(output)
    assert code == 0 and report["healthy"] and report["examples"] == 3 and len(report["checks"]) == 6
    code, output = run("--dtype", "float32")
    assert code == 0 and output.count("rounding explains up to 1e-04") == 3 and "LlamaForCausalLM" in output
    assert run("--dtype", "auto")[0] == 2
    monkeypatch.setitem(module.BOUNDS, torch.float32, 1e-12)
    assert run("--dtype", "float32")[0] == 1
    assert u2a_fast.selftest is selftest

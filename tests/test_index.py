"""The gradient index: what its rows are, how far its estimates may be off, and that it resumes and refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
from torch import Tensor

from u2a_fast import GradientIndex, directional_derivatives
from u2a_fast.influence import index as module
from u2a_fast.models.projection import Sketch, two_sided
from u2a_fast.sketch import sketch_map


def linear_gradients(model, batch) -> list[dict[str, Tensor]]:
    """Per-example gradients of every linear layer's weight, (O, I), by autograd."""
    named = {n: p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "wte" not in n}
    named = {n: p for n, p in named.items() if "wpe" not in n}
    out = []
    for example in batch:
        grads = torch.autograd.grad(tiny.own_nll(model, example), list(named.values()))
        out.append(
            {n: g.mT if "gpt2" in type(model).__name__.lower() else g for n, g in zip(named, grads, strict=True)}
        )
    return out


def rows_of(index: GradientIndex) -> np.ndarray:
    return np.concatenate(list(index.shards.shards()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_sketch_row_is_the_sketch_of_the_gradient(family: str, tmp_path: Path) -> None:
    model, batch = tiny.build(family).float(), tiny.examples(5)
    index = GradientIndex.build(model, batch, tmp_path, dim=64, seed=3, token_budget=40, shard_rows=3)
    assert rows_of(index).shape == (5, 64) and len(index) == 5
    weights = index.shards.manifest["weights"]
    assert ("lm_head.weight" in weights) == (family == "llama"), "a tied head is left out"
    for row, gradient in zip(rows_of(index), linear_gradients(model, batch), strict=True):
        want = torch.zeros(64, dtype=torch.float64)
        assert set(weights) == set(gradient)
        for i, name in enumerate(weights):
            g = gradient[name].double()
            entry, sign = sketch_map(*g.shape, 64, (3 << 20) + i, g.device)
            want.index_add_(0, entry.flatten(), (g * sign).flatten())
        # sums of thousands of entries, each off by some float32 roundings of the backward pass
        assert (torch.from_numpy(row) - want).norm() <= 1e-5 * want.norm()


def test_a_random_row_is_projected_on_both_sides(tmp_path: Path) -> None:
    model, batch = tiny.build("llama").float(), tiny.examples(4)
    index = GradientIndex.build(model, batch, tmp_path, projection="random", dim=9, seed=2)
    weights = index.shards.manifest["weights"]
    assert rows_of(index).shape == (4, 9 * len(weights))
    for row, gradient in zip(rows_of(index), linear_gradients(model, batch), strict=True):
        parts = []
        for i, name in enumerate(weights):
            p = two_sided(*gradient[name].shape, 3, (2 << 20) + i, torch.device("cpu"))
            parts.append((p.p_out.T @ gradient[name] @ p.p_in).flatten())
        want = torch.cat(parts)
        assert (torch.from_numpy(row) - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
@pytest.mark.parametrize("kind", ["sketch", "random"])
def test_projections_are_unbiased_and_within_their_variance(kind: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, *shape, generator=generator, dtype=torch.float64).cumsum(0)[-1] for _ in range(2))
    y = y + 0.5 * x
    k, draws = 6, 600
    make = {"sketch": lambda seed: Sketch(36, seed), "random": lambda seed: two_sided(*shape, k, seed, x.device)}[kind]
    found = torch.stack([make(seed).project(x) @ make(seed).project(y) for seed in range(draws)])
    bound = 2 / 36 if kind == "sketch" else 4 / k + 4 / k**2
    variance = bound * (x.norm() * y.norm()) ** 2
    assert (found.mean() - (x * y).sum()).abs() <= 4 * (variance / draws).sqrt()
    # the variance of 600 draws is known to a few parts in ten
    assert 0.05 * variance < found.var() <= 1.3 * variance


def test_estimates_are_as_good_as_the_theory_says(tmp_path: Path) -> None:
    model, batch = tiny.build("llama").float(), tiny.examples(30)
    index = GradientIndex.build(model, batch, tmp_path, dim=8192)
    gradients = linear_gradients(model, batch)
    v = {name: sum(g[name] for g in gradients[:3]) for name in gradients[0]}
    exact = directional_derivatives(model, batch, v).numpy()
    length = np.array([sum(float(g[n].square().sum()) for n in v) ** 0.5 for g in gradients])
    length *= sum(float(d.square().sum()) for d in v.values()) ** 0.5
    error = (index.scores(v) - exact) / length
    # errors share one projection, so their mean square has a heavier tail than that of independent ones: Markov's
    # inequality leaves 1 in 9 seeds above three times its root; this seed is fixed
    assert 0 < np.sqrt((error**2).mean()) <= 3 * (2 / 8192) ** 0.5
    assert np.corrcoef(index.scores(v), exact)[0, 1] > 0.9
    assert index.coverage(v) == 1.0
    whole = v | {"model.norm.weight": torch.ones(32)}
    assert 0 < index.coverage(whole) < 1
    positions, values = index.topk(batch, whole, 3, candidates=12)
    truth = directional_derivatives(model, batch, whole).numpy()
    assert positions.tolist() == np.argsort(-truth)[:3].tolist()
    assert np.allclose(values, truth[positions], rtol=1e-5)
    assert index.candidates(v, 99).shape == (30,)


class _Killed(BaseException):
    pass


def test_resumes_at_the_first_missing_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.build("llama").float(), tiny.examples(7)
    options = {"dim": 32, "shard_rows": 3}
    whole = GradientIndex.build(model, batch, tmp_path / "whole", **options)
    run_batches, calls = module.run_batches, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise _Killed
        return run_batches(*args)

    monkeypatch.setattr(module, "run_batches", killed)
    with pytest.raises(_Killed):
        GradientIndex.build(model, batch, tmp_path / "part", **options)
    with pytest.raises(FileNotFoundError, match=r"unfinished: .*shard-000001\.npy"):
        GradientIndex(model, tmp_path / "part")
    part = GradientIndex.build(model, batch, tmp_path / "part", **options)
    assert len(calls) == 4, "the first shard was not made again"
    assert np.array_equal(rows_of(part), rows_of(whole))


def test_refusals(tmp_path: Path) -> None:
    model, batch = tiny.build("llama").float(), tiny.examples(3)
    for options, words in [
        ({"projection": "pca"}, "expected a projection out of"),
        ({"dim": 31}, "expected dim an int from 32 to 8192"),
        ({"projection": "random", "dim": 10}, "expected a square number"),
        ({"seed": -1}, "expected a seed"),
        ({"shard_rows": 0}, "expected shard_rows"),
        ({"parameters": "norm"}, "has no selected linear layer"),
    ]:
        with pytest.raises(ValueError, match=words):
            GradientIndex.build(model, batch, tmp_path / "bad", **options)
    assert not (tmp_path / "bad").exists()
    index = GradientIndex.build(model, batch, tmp_path / "a", dim=32)
    with pytest.raises(FileExistsError, match="an index of another dim, width"):
        GradientIndex.build(model, batch, tmp_path / "a", dim=64)
    with pytest.raises(FileExistsError, match="an index of another examples"):
        GradientIndex.build(model, batch[::-1], tmp_path / "a", dim=32)
    with pytest.raises(ValueError, match="built from other examples"):
        index.topk(batch[::-1], {}, 1)
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        GradientIndex(model, tmp_path / "b")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="built with another model"):
        GradientIndex(model, tmp_path / "a")
    manifest = tmp_path / "a" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 0}))
    with pytest.raises(ValueError, match="expected an index of version 1, got 0"):
        GradientIndex(model, tmp_path / "a")

"""The gradient index: what its rows are, how far its estimates may be off, and that it resumes and refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from u2a_fast import GradientIndex, directional_derivatives
from u2a_fast.influence import projections as module
from u2a_fast.influence.derivatives import DerivativePass
from u2a_fast.influence.projections import BASES, PROJECTIONS, Projections, Projector
from u2a_fast.models import projection
from u2a_fast.models.memory import TokenBudget
from u2a_fast.models.projection import SecondMoments, Sketch, TwoSided, two_sided
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


def projector_of(model, batch, kind: str, dim: int, folder: Path) -> Projector:
    """What an index is made with; the shards, which are float32, left out."""
    passes = DerivativePass(model, [])
    passes.decoder.materialize_head()
    projections = Projections(passes.decoder, dict(model.named_parameters()), kind, dim, 5)
    projector = Projector(passes, projections, TokenBudget(40), None)
    folder.mkdir()
    projector.settle(folder, batch[:6])
    return projector


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["random", "pca", "identity"])
def test_an_estimate_is_the_inner_product_of_what_was_projected(kind: str, family: str, tmp_path: Path) -> None:
    model, batch = tiny.build(family), tiny.examples(8)
    with tiny.true_float64():
        projector = projector_of(model, batch, kind, 25, tmp_path / "a")
        rows, gradients = projector.rows(batch), linear_gradients(model, batch)
    v = tiny.direction(model)
    want = np.zeros(len(batch))
    for name, transposed in projector.projections.weights.items():
        found = projector.projections.by_name[name]
        assert isinstance(found, TwoSided)
        p_in, p_out = found.p_in.double(), found.p_out.double()
        along = p_out.T @ (v[name].T if transposed else v[name]) @ p_in
        assert along.shape == (5, 5)
        want += [float((along * (p_out.T @ g[name] @ p_in)).sum()) for g in gradients]
        if kind != "random":
            assert (p_in.T @ p_in - torch.eye(5)).abs().max() < 1e-12
        if kind == "identity":
            assert torch.equal(along, (v[name].T if transposed else v[name])[:5, :5])
    np.testing.assert_allclose(rows @ projector.projections.project(v), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["pca", "identity"])
def test_a_whole_basis_gives_exact_derivatives(kind: str, family: str, tmp_path: Path) -> None:
    model, batch = tiny.build(family), tiny.examples(8)
    with tiny.true_float64():
        projector = projector_of(model, batch, kind, 128**2, tmp_path / "a")
        linear = {name: v for name, v in tiny.direction(model).items() if name in projector.projections.weights}
        want = tiny.per_example(model, batch, linear).numpy()
        rows = projector.rows(batch)
    np.testing.assert_allclose(rows @ projector.projections.project(linear), want, rtol=1e-10, atol=1e-10)
    model = model.float()
    index = GradientIndex.build(model, batch, tmp_path / "b", projection=kind, dim=128**2)
    linear = {name: v.float() for name, v in linear.items()}
    exact = directional_derivatives(model, batch, linear).numpy()
    np.testing.assert_allclose(index.scores(linear), exact, rtol=1e-4, atol=1e-4)
    assert index.coverage(linear) == pytest.approx(1)


def test_principal_axes_are_those_of_the_layers_tokens(tmp_path: Path) -> None:
    model, batch = tiny.build("llama"), tiny.examples(6)
    layer, name = model.model.layers[0].mlp.up_proj, "model.layers.0.mlp.up_proj.weight"
    kept: list[Tensor] = []

    def keep(module, args, out) -> None:
        out.retain_grad()
        kept.extend([args[0].detach()[0], out])

    with tiny.true_float64():
        found = projector_of(model, batch, "pca", 9, tmp_path / "a").projections.by_name[name]
        with layer.register_forward_hook(keep):
            for example in batch:
                tiny.own_nll(model, example).backward()
    assert isinstance(found, TwoSided)
    # tokens behind the last scored one are not packed
    used = [max(t for t, label in enumerate(e["labels"]) if label != -100) for e in batch]
    inputs = torch.cat([a[:n] for a, n in zip(kept[::2], used, strict=True)])
    outputs = torch.cat([y.grad[0, :n] for y, n in zip(kept[1::2], used, strict=True)])
    for rows, p in [(inputs, found.p_in), (outputs, found.p_out)]:
        axes = torch.linalg.svd(rows, full_matrices=False)[2][:3].T
        assert (axes @ axes.T - p @ p.T).abs().max() < 1e-10


@pytest.mark.parametrize("limit", [1024, 8])
def test_streamed_moments_have_the_leading_eigenvectors(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts as at once, from the whole matrix as from its product with a random one, and whatever is not finite."""
    monkeypatch.setattr(projection, "EXACT_SIDE", limit)
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(60, n, generator=generator, dtype=torch.float64) for n in (40, 30))
    a, g = a * 0.5 ** torch.arange(40), g * 0.5 ** torch.arange(30)
    moments = SecondMoments(30, 40, 4, 1, torch.device("cpu"))
    for start in range(0, 60, 20):
        part = torch.tensor([0, 5, 20], dtype=torch.int32)
        assert moments.contract(a[start : start + 20], g[start : start + 20], part).shape == (0, 2)
    spoiled = torch.full((2, 40), float("nan"), dtype=torch.float64), torch.ones(2, 30, dtype=torch.float64)
    moments.contract(*spoiled, torch.tensor([0, 2], dtype=torch.int32))
    basis = moments.basis(torch.float64)
    for rows, p in [(a, basis.p_in), (g, basis.p_out)]:
        axes = torch.linalg.svd(rows, full_matrices=False)[2][:4].T
        assert (p.T @ p - torch.eye(4)).abs().max() < 1e-12
        assert (axes @ axes.T - p @ p.T).abs().max() < (1e-12 if limit == 1024 else 1e-3)


@pytest.mark.parametrize("limit", [1024, 8])
def test_fewer_directions_than_columns_still_give_an_orthonormal_basis(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "EXACT_SIDE", limit)
    for rows in (torch.ones(1, 40), torch.zeros(1, 40)):
        moments = SecondMoments(40, 40, 4, 1, torch.device("cpu"))
        moments.contract(rows, rows, torch.tensor([0, 1], dtype=torch.int32))
        p = moments.basis(torch.float64).p_in
        assert p.shape == (40, 4) and (p.T @ p - torch.eye(4)).abs().max() < 1e-12
        assert (p.T @ rows[0].double()).norm() == pytest.approx(rows.norm())


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


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_resumes_at_the_first_missing_shard(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.build("llama").float(), tiny.examples(7)
    options = {"projection": kind, "dim": 36, "shard_rows": 3, "pca_sample": 5, "seed": 4}
    whole = GradientIndex.build(model, batch, tmp_path / "whole", **options)
    run_batches, calls = module.run_batches, []
    measured = int(kind == "pca")  # by one call more, before the first shard

    def killed(*args):
        calls.append(args)
        if len(calls) == 2 + measured:
            raise _Killed
        return run_batches(*args)

    monkeypatch.setattr(module, "run_batches", killed)
    with pytest.raises(_Killed):
        GradientIndex.build(model, batch, tmp_path / "part", **options)
    with pytest.raises(FileNotFoundError, match=r"unfinished: .*shard-000001\.npy"):
        GradientIndex(model, tmp_path / "part")
    part = GradientIndex.build(model, batch, tmp_path / "part", **options)
    assert len(calls) == 4 + measured, "neither the first shard nor the axes were made again"
    assert np.array_equal(rows_of(part), rows_of(whole))
    assert {f.name for f in part.shards.folder.iterdir()} == {f.name for f in whole.shards.folder.iterdir()}
    for file in whole.shards.folder.iterdir():
        assert file.read_bytes() == (part.shards.folder / file.name).read_bytes()
    v = tiny.direction(model)
    assert np.array_equal(GradientIndex(model, tmp_path / "part").scores(v), whole.scores(v))


def test_a_resumed_index_keeps_the_axes_that_its_rows_were_made_with(tmp_path: Path) -> None:
    """Another machine rounds differently and finds other axes, or the same ones with other signs."""
    model, batch = tiny.build("llama").float(), tiny.examples(7)
    options = {"projection": "pca", "dim": 4, "shard_rows": 3}
    whole = GradientIndex.build(model, batch, tmp_path / "a", **options)
    scores, bases = whole.scores(tiny.direction(model)), tmp_path / "a" / BASES
    save_file({name: -p for name, p in load_file(bases).items()}, bases)
    for shard in (tmp_path / "a").glob("shard-*.npy"):
        shard.unlink()
    flipped = GradientIndex.build(model, batch, tmp_path / "a", **options)
    assert np.array_equal(flipped.scores(tiny.direction(model)), scores), "two signs each cancel"
    (tmp_path / "a" / "shard-000002.npy").unlink()
    bases.unlink()
    with pytest.raises(FileNotFoundError, match="by which shard-000000.npy was projected"):
        GradientIndex.build(model, batch, tmp_path / "a", **options)


def test_damaged_axes_are_refused(tmp_path: Path) -> None:
    model, batch = tiny.build("llama").float(), tiny.examples(3)
    GradientIndex.build(model, batch, tmp_path / "a", projection="pca", dim=4)
    bases = tmp_path / "a" / BASES
    whole = load_file(bases)
    save_file({name: p[:, :1].contiguous() for name, p in whole.items()}, bases)
    with pytest.raises(ValueError, match="expected projections of .* of shapes"):
        GradientIndex(model, tmp_path / "a")
    bases.write_bytes(bases.read_bytes()[:100])
    with pytest.raises(ValueError, match="expected the projections of pca, got"):
        GradientIndex(model, tmp_path / "a")
    bases.unlink()
    with pytest.raises(FileNotFoundError, match="without which the rows beside it mean nothing"):
        GradientIndex(model, tmp_path / "a")


def test_refusals(tmp_path: Path) -> None:
    model, batch = tiny.build("llama").float(), tiny.examples(3)
    for options, words in [
        ({"projection": "svd"}, r"expected a projection out of \['sketch', 'random', 'pca', 'identity'\], got 'svd'"),
        ({"dim": 31}, "expected dim an int from 32 to 8192"),
        *(({"projection": kind, "dim": 10}, "expected a square number") for kind in ("random", "pca", "identity")),
        ({"pca_sample": 0}, "expected pca_sample of at least 1"),
        ({"seed": -1}, "expected a seed"),
        ({"shard_rows": 0}, "expected shard_rows"),
        ({"parameters": "norm"}, "has no selected linear layer"),
    ]:
        with pytest.raises(ValueError, match=words):
            GradientIndex.build(model, batch, tmp_path / "bad", **options)
    with pytest.raises(ValueError, match="expected examples to measure"):
        GradientIndex.build(model, [], tmp_path / "bad", projection="pca")
    assert not (tmp_path / "bad").exists()
    GradientIndex.build(model, batch, tmp_path / "pca", projection="pca", dim=4)
    with pytest.raises(FileExistsError, match="an index of another pca_sample"):
        GradientIndex.build(model, batch, tmp_path / "pca", projection="pca", dim=4, pca_sample=2)
    with pytest.raises(FileExistsError, match="an index of another .*projection"):
        GradientIndex.build(model, batch, tmp_path / "pca", projection="identity", dim=4)
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

"""Shortlists, certified top k, explanations and gradient indexes on the command line, and what select makes of them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_cli import error_line, run, start, stop_at_the_end, wait_for, write_rows
from tiny_files import save_tiny_model, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from u2a_fast import DPO, GradientIndex, InfluenceScorer
from u2a_fast.cli import app
from u2a_fast.data import read_negatives, read_preferences
from u2a_fast.influence import modes
from u2a_fast.influence.ranks import RankPlan
from u2a_fast.models.loading import load_model
from u2a_fast.store import lock_folder, read_scores, read_selection

COUNT = 330  # more than a shortlist of a twentieth and the sample of 256 that its recall is measured on


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A model, negatives and preferences; read, never written."""
    folder = tmp_path_factory.mktemp("files")
    save_tiny_model(folder / "model")
    write_rows(
        folder / "negatives.jsonl",
        [{"id": f"n{i}", "prompt": f"q {i}", "response": f"no {i * i}" * (1 + i % 3)} for i in range(COUNT)],
    )
    write_rows(
        folder / "preferences.jsonl", [{"prompt": f"p {i}", "chosen": "yes", "rejected": f"no {i}"} for i in range(8)]
    )
    return folder


def basic(files: Path, out: Path) -> list[object]:
    data = ["--negatives", files / "negatives.jsonl", "--preferences", files / "preferences.jsonl"]
    return ["--model", files / "model", *data, "--out", out, "--no-signal-check"]


def scoring(files: Path, out: Path, *more: object) -> list[str]:
    return [str(a) for a in ("score", *basic(files, out), *more)]


def building(files: Path, out: Path, *more: object) -> list[str]:
    data = ["--model", files / "model", "--negatives", files / "negatives.jsonl", "--out", out]
    return [str(a) for a in ("index", "build", *data, "--dim", 256, "--shard-rows", 64, *more)]


def asking(files: Path, index: Path, out: Path, *more: object) -> list[str]:
    return [str(a) for a in ("index", "score", *basic(files, out), "--index", index, "--top-k", 5, *more)]


@pytest.fixture(scope="module")
def exact(files, tmp_path_factory) -> dict[str, np.ndarray]:
    """Every negative's exact score."""
    out = tmp_path_factory.mktemp("exact") / "out"
    run(*scoring(files, out))
    return read_scores(out)


@pytest.fixture(scope="module")
def shortlist(files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shortlist") / "out"
    run(*scoring(files, out, "--mode", "shortlist", "--rank", 2, "--fraction", 0.05))
    return out


@pytest.fixture(scope="module")
def index(files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("index") / "out"
    run(*building(files, out))
    return out


def best_of(exact: dict[str, np.ndarray], k: int) -> list[str]:
    return exact["id"][np.argsort(-exact["score"], kind="stable")[:k]].tolist()


def test_a_shortlist_says_what_is_exact_and_what_it_missed(files, exact, shortlist, tmp_path):
    found = read_scores(shortlist)
    assert found["id"].tolist() == exact["id"].tolist()
    assert found["exact"].sum() == 17 + 256
    np.testing.assert_allclose(found["score"][found["exact"]], exact["score"][found["exact"]], rtol=1e-5)
    made = yaml.safe_load((shortlist / "run.yaml").read_text())["result"]["scoring"]
    assert (made["mode"], made["rows"], made["rescored"], made["route"]) == ("shortlist", COUNT, 273, "forward")
    assert 0 < made["energy"] < 1 and "one direction" in made["reason"]
    low, high = made["recall_interval"]
    assert 0 <= low <= made["recall"] <= high <= 1
    replay = run("score", "--config", shortlist / "run.yaml", "--out", tmp_path / "again")
    assert f"scoring recall: {made['recall']:.6g}\nscoring recall interval: {low:.6g}, {high:.6g}" in replay.stdout
    assert (tmp_path / "again" / "scores.parquet").read_bytes() == (shortlist / "scores.parquet").read_bytes()


def test_select_ranks_exact_scores_alone(shortlist, tmp_path):
    """An approximation that is too large by chance must not push out what was scored exactly."""
    found = read_scores(shortlist)
    result = run("select", "--scores", shortlist, "--strategy", "threshold", "--out", tmp_path / "s", "--json")
    chosen = read_selection(tmp_path / "s")["id"]
    assert set(chosen) == set(found["id"][found["exact"] & (found["score"] > 0)])
    assert json.loads(result.stdout)["dropped_approximate"] == COUNT - 273
    assert f"{COUNT - 273} of {COUNT} negatives left out" in result.stderr
    keep = ("--strategy", "threshold", "--approximate", "keep", "--out", tmp_path / "t")
    assert "scores are approximations" in run("select", "--scores", shortlist, *keep).stderr
    assert set(read_selection(tmp_path / "t")["id"]) == set(found["id"][found["score"] > 0])
    run("select", "--config", tmp_path / "t" / "run.yaml", "--out", tmp_path / "u")
    assert len(read_selection(tmp_path / "u")["id"]) == len(read_selection(tmp_path / "t")["id"])


def test_select_ranks_approximations_among_themselves(files, tmp_path):
    run(*scoring(files, tmp_path / "low", "--mode", "lowrank", "--rank", 2))
    result = run("select", "--scores", tmp_path / "low", "--k", 9, "--out", tmp_path / "s")
    assert f"warning: {COUNT} of {COUNT} scores are approximations" in result.stderr
    assert read_selection(tmp_path / "s")["id"].tolist() == best_of(read_scores(tmp_path / "low"), 9)


@pytest.mark.parametrize("more", [(), ("--rank", 4), ("--mode", "reverse", "--curvature", "fisher")])
def test_top_k_is_the_true_one(files, exact, tmp_path, more):
    made = json.loads(run(*scoring(files, tmp_path / "out", "--top-k", 7, *more, "--json")).stdout)
    assert made["rows"] == 7 and made["scoring"]["certified"] is True and made["scoring"]["rows"] == COUNT
    assert 7 <= made["scoring"]["rescored"] <= COUNT and made["scoring"]["route"]
    found = read_scores(tmp_path / "out")
    assert found["exact"].all() and (np.diff(found["score"]) <= 0).all()
    if "fisher" not in more:
        assert found["id"].tolist() == best_of(exact, 7)
    run("select", "--scores", tmp_path / "out", "--k", 3, "--out", tmp_path / "s")
    assert read_selection(tmp_path / "s")["id"].tolist() == found["id"][:3].tolist()


def test_top_k_replays_resolves_nothing_twice_and_is_not_overwritten(files, tmp_path):
    run(*scoring(files, tmp_path / "a", "--top-k", 4))
    options = yaml.safe_load((tmp_path / "a" / "run.yaml").read_text())["options"]
    assert (options["top_k"], options["rank"]) == (4, None) and "explain" not in options
    run("score", "--config", tmp_path / "a" / "run.yaml", "--out", tmp_path / "b")
    first, second = (read_scores(tmp_path / name) for name in "ab")
    assert first["id"].tolist() == second["id"].tolist()
    assert "pass --overwrite" in error_line(run(*scoring(files, tmp_path / "a", "--top-k", 4), code=2))
    run(*scoring(files, tmp_path / "a", "--top-k", 2, "--overwrite"))
    assert len(read_scores(tmp_path / "a")["id"]) == 2


def test_more_than_there_are_is_all_of_them(files, exact, index, tmp_path):
    for arguments in (
        scoring(files, tmp_path / "a", "--top-k", 999),
        asking(files, index, tmp_path / "b", "--top-k", 999),
    ):
        assert f"warning: --top-k 999 of {COUNT} negatives: all of them, sorted" in run(*arguments).stderr
    for name in "ab":
        assert read_scores(tmp_path / name)["id"].tolist() == best_of(exact, COUNT)


def test_refusals_of_score(files, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    half = tmp_path / "half"
    tiny_model().to(torch.bfloat16).save_pretrained(half)
    tiny_tokenizer().save_pretrained(half)
    for options, words in [
        (["--top-k", 3, "--mode", "shortlist"], "expected --mode out of ['auto', 'forward', 'reverse'] with --top-k"),
        (["--top-k", 3, "--dtype", "bfloat16"], "here --dtype float32"),
        (["--top-k", 3, "--model", half], "expected float32 or float64 for a certificate, got torch.bfloat16"),
        (["--top-k", 3, "--model", half, "--explain"], "here --dtype float32"),
        (["--mode", "shortlist", "--fraction", 1.5], "expected a fraction in (0, 1], got 1.5"),
        (["--mode", "shortlist", "--fraction", "nan"], "expected a fraction in (0, 1], got nan"),
        (["--rank", 4], "expected --mode lowrank or shortlist, or --top-k, with --rank, got 'auto'"),
        (["--mode", "layers", "--rank", 4], "or --top-k, with --rank, got 'layers'"),
        (["--mode", "lowrank", "--fraction", 0.1], "expected --mode layers or shortlist with --fraction, got"),
        (["--top-k", 3, "--fraction", 0.1], "with --fraction, got --top-k"),
        (["--top-k", 3, "--negatives", tmp_path / "empty.jsonl"], "got the empty source"),
        (["--mode", "shortlist", "--negatives", tmp_path / "absent.jsonl"], "no such file or folder"),
    ]:
        assert words in error_line(run(*scoring(files, tmp_path / "out", *options), code=2)), options
        assert not (tmp_path / "out").exists(), options
    run(*scoring(files, tmp_path / "out", "--top-k", 3, "--model", half, "--dtype", "float32"))
    for options in (["--top-k", 0], ["--rank", 0], ["--mode", "fast"], ["--seed", -1], ["--seed", 2**31]):
        assert "Invalid value" in run(*scoring(files, tmp_path / "bad", *options), code=2).stderr


def test_bad_rows_met_in_a_stream(files, tmp_path):
    negatives = tmp_path / "n.jsonl"
    negatives.write_text((files / "negatives.jsonl").read_text() + "{broken\n")
    options = ["--negatives", negatives, "--streaming", "--top-k", 3]
    result = run(*scoring(files, tmp_path / "out", *options), code=2)
    assert "invalid JSON" in result.stderr and not (tmp_path / "out" / "scores.parquet").exists()
    run(*scoring(files, tmp_path / "out", *options, "--on-bad-row", "skip"))
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 1


def test_windows_of_another_run_are_not_mixed_in(files, tmp_path):
    negatives = tmp_path / "n.jsonl"
    negatives.write_text((files / "negatives.jsonl").read_text() + "{broken\n")
    broken = ["--negatives", negatives, "--streaming", "--window", 100]
    run(*scoring(files, tmp_path / "out", *broken), code=2)
    assert (tmp_path / "out" / "parts").exists()
    at_once = scoring(files, tmp_path / "out", "--window", 100, "--top-k", 3)
    assert "unfinished scores made with other settings" in error_line(run(*at_once, code=2))
    run(*at_once, "--overwrite")
    assert not (tmp_path / "out" / "parts").exists() and len(read_scores(tmp_path / "out")["id"]) == 3


def test_explain_prints_and_writes_nothing(files, tmp_path):
    text = run(*scoring(files, tmp_path / "out", "--explain")).stdout
    assert "route: forward\nreason: one direction" in text
    assert "   2 x model.layers.*.input_layernorm: rms_norm_jvp" in text and "1 x lm_head: linear_logprob_jvp" in text
    for more, passes in [
        (("--mode", "lowrank", "--curvature", "fisher"), ["low rank"]),
        (("--mode", "shortlist", "--rank", 2), ["low rank", "exact"]),
        (("--mode", "layers"), ["some layers"]),
        (("--top-k", 3), ["exact"]),  # a CPU takes 2.2 units for exact scores of everything
        (("--top-k", 3, "--rank", 2), ["bounded low rank", "exact"]),
    ]:
        found = json.loads(run(*scoring(files, tmp_path / "out", "--explain", "--json", *more)).stdout)["passes"]
        assert [p["pass"] for p in found] == passes
        assert all(p["route"] and p["reason"] and "model.layers.0.mlp.up_proj" in p["modules"] for p in found)
    assert not (tmp_path / "out").exists()


def test_explain_shows_the_ranks_that_a_top_k_would_take(files, tmp_path, monkeypatch):
    monkeypatch.setattr(modes, "exact_units", lambda *_: 3.0)  # where exact scores cost enough for a plan to pay
    explaining = scoring(files, tmp_path / "out", "--top-k", 3, "--explain")
    shown = json.loads(run(*explaining, "--json").stdout)["passes"][0]
    assert 2 < shown["units"] < 3 and 3 / COUNT <= shown["rescored_share"] < 1 / 3, "what the cost model asks for"
    plan_ranks = modes.plan_ranks
    plans = []

    def planned(*given):
        plans.append(plan_ranks(*given))
        names = [name for name in given[0] if name.endswith("up_proj.weight")]
        return RankPlan({name: 3 + i for i, name in enumerate(names)}, 2.5, 0.25)

    monkeypatch.setattr(modes, "plan_ranks", planned)
    text = run(*explaining).stdout
    assert (plans[0].units, plans[0].rescored) == (shown["units"], shown["rescored_share"])
    assert "reason: ranks planned by cost on 64 negatives\n" in text
    assert "units: 2.5\nrescored share: 0.25\n" in text
    assert "   2 x model.layers.*.mlp.up_proj: ghost_dot_lowrank, rank 3 to 4\n" in text
    assert "   2 x model.layers.*.mlp.down_proj: ghost_dot\n" in text
    monkeypatch.setattr(modes, "plan_ranks", lambda *_: RankPlan({}, 3.5, 1.0))
    text = run(*explaining).stdout
    assert "bounded low rank" not in text and "note: a bounded pass before it would save nothing" in text
    assert not (tmp_path / "out").exists()


def test_nan_weights_are_counted_by_every_way_to_score(files, tmp_path):
    """One byte, which a single negative holds, has an embedding of NaN."""
    shutil.copytree(files / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    token = tiny_tokenizer().convert_tokens_to_ids("~")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    rows = [{"id": str(i), "prompt": "q", "response": f"~{i}" if i == 5 else f"no {i}"} for i in range(9)]
    given = ["--model", tmp_path / "model", "--negatives", write_rows(tmp_path / "n.jsonl", rows)]
    words = "1 scores are NaN or infinite and stay so: 5"
    assert words in run(*scoring(files, tmp_path / "s", *given, "--mode", "shortlist")).stderr
    assert words in run(*scoring(files, tmp_path / "t", *given, "--top-k", 9)).stderr
    assert read_scores(tmp_path / "t")["id"][-1] == "5", "NaN last"
    assert "are not (first: id '5')" in error_line(
        run("select", "--scores", tmp_path / "s", "--k", 2, "--out", tmp_path / "x", code=2)
    )
    assert "the gradients of 1 negatives are NaN" in run(*building(files, tmp_path / "i", *given)).stderr
    result = run(*asking(files, tmp_path / "i", tmp_path / "j", *given, "--top-k", 3))
    assert "NaN" not in result.stderr and np.isfinite(read_scores(tmp_path / "j")["score"]).all()
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert "9 scores are NaN" in run(*scoring(files, tmp_path / "all", *given, "--top-k", 9)).stderr
    whole = run(*asking(files, tmp_path / "i", tmp_path / "k", *given, "--overwrite"), code=2)
    assert "was built with another model" in error_line(whole)


def test_an_index_finds_and_scores_exactly(files, exact, index, tmp_path):
    assert {p.name for p in index.iterdir()} == {"gradients", "index.json", "run.yaml", "skipped.jsonl"}
    built = json.loads((index / "index.json").read_text())
    assert (built["rows"], built["width"], built["resumed_rows"], built["nonfinite"]) == (COUNT, 256, 0, 0)
    arguments = asking(files, index, tmp_path / "out", "--candidates", 40, "--signal-check", "--json")
    made = json.loads(run(*arguments).stdout)
    report = made["scoring"]
    assert (report["mode"], report["rescored"], report["certified"]) == ("index", 40 + 256, False)
    assert 0 < report["coverage"] < 1 and report["route"] == "forward" and -1 <= report["spearman"] <= 1
    assert report["recall_interval"][0] <= report["recall"] <= report["recall_interval"][1]
    assert made["signal"] == json.loads((tmp_path / "out" / "signal.json").read_text())
    found = read_scores(tmp_path / "out")
    known = dict(zip(exact["id"], exact["score"], strict=True))
    assert found["exact"].all() and len(found["id"]) == 5
    np.testing.assert_allclose(found["score"], [known[name] for name in found["id"]], rtol=1e-5)
    run("index", "score", "--config", tmp_path / "out" / "run.yaml", "--out", tmp_path / "again")
    assert read_scores(tmp_path / "again")["id"].tolist() == found["id"].tolist()
    run("select", "--scores", tmp_path / "out", "--k", 2, "--out", tmp_path / "s")
    record = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert record["command"] == "index score" and str(index / "gradients/manifest.json") in record["inputs_sha256"]
    assert "is a run of 'index score'" in error_line(
        run("index", "build", "--config", tmp_path / "out" / "run.yaml", code=2)
    )


def test_an_index_agrees_with_python_and_replays(files, index, tmp_path):
    run("index", "build", "--config", index / "run.yaml", "--out", tmp_path / "again")
    for shard in sorted((index / "gradients").glob("*.npy")):
        assert shard.read_bytes() == (tmp_path / "again" / "gradients" / shard.name).read_bytes()
    model, tokenizer = load_model(files / "model")
    negatives = list(read_negatives(files / "negatives.jsonl", tokenizer))
    GradientIndex.build(model, negatives, tmp_path / "python", dim=256, shard_rows=64)
    run(*asking(files, tmp_path / "python", tmp_path / "out", "--loss", "npo", "--curvature", "fisher"))
    scorer = InfluenceScorer(
        model, tokenizer, DPO(read_preferences(files / "preferences.jsonl", tokenizer)), "fisher", loss="npo"
    )
    expected = scorer.topk_by_index(negatives, GradientIndex(model, tmp_path / "python"), 5)
    assert read_scores(tmp_path / "out")["score"].tolist() == expected.score.tolist()
    exact = scorer.score(negatives)
    order = [int(name[1:]) for name in expected.id]
    np.testing.assert_allclose(expected.score, exact.score[order], rtol=1e-5)


def test_refusals_of_an_index(files, index, tmp_path):
    for options, words in [
        (["--dim", 31], "expected dim an int from 32 to 8192"),
        (["--projection", "random", "--dim", 10], "expected a square number"),
        (["--projection", "pca", "--dim", 10], "expected a square number"),
        (["--negatives", tmp_path / "absent.jsonl"], "no such file or folder"),
        (["--model", tmp_path / "absent"], "no such folder"),
    ]:
        assert words in error_line(run(*building(files, tmp_path / "i", *options), code=2))
        assert not (tmp_path / "i").exists(), options
    assert "has no selected linear layer" in error_line(
        run(*building(files, tmp_path / "i", "--parameters", "norm"), code=2)
    )
    assert "index.json: pass --overwrite" in error_line(run(*building(files, index), code=2))
    save_tiny_model(tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file(
        {name: v * 1.1 for name, v in weights.items()},
        tmp_path / "other" / "model.safetensors",
        metadata={"format": "pt"},
    )
    lines = (files / "negatives.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(lines[1:]))
    for options, words in [
        (["--index", tmp_path / "absent"], "no such file"),
        (["--index", files / "negatives.jsonl"], "no such file"),
        (["--candidates", 2], "expected --candidates of at least --top-k 5, got 2"),
        (["--model", tmp_path / "other"], "was built with another model"),
        (["--negatives", tmp_path / "fewer.jsonl"], f"other examples than these: expected {COUNT} rows"),
        (["--add-bos"], "built from other examples"),
        (["--reduction", "sum"], "expected the reduction 'mean' of the index, got 'sum'"),
        (["--objective", "sft"], "expected --positives"),
    ]:
        assert words in error_line(run(*asking(files, index, tmp_path / "out", *options), code=2)), options
        assert not (tmp_path / "out").exists(), options


@pytest.fixture
def copied(index, tmp_path) -> Iterator[Path]:
    yield Path(shutil.copytree(index, tmp_path / "copy"))


def test_damaged_indexes_end_in_one_line(files, copied, tmp_path):
    shards, manifest = copied / "gradients", copied / "gradients" / "manifest.json"
    whole, last = manifest.read_text(), shards / "shard-000005.npy"
    for content, words in [
        ("{half", "expected JSON"),
        ("[]", "expected the manifest of an index"),
        ('{"rows": 1}', "without ['width', 'shard_rows']"),
        (json.dumps(json.loads(whole) | {"version": 7}), "expected an index of version 1, got 7"),
    ]:
        manifest.write_text(content)
        assert words in error_line(run(*asking(files, copied, tmp_path / "out"), code=2))
    manifest.write_text(whole)
    last.write_bytes(last.read_bytes()[:500])
    assert "expected a shard of shape (10, 256)" in error_line(run(*asking(files, copied, tmp_path / "out"), code=2))
    last.write_bytes(b"")
    assert "expected a shard of shape (10, 256)" in error_line(run(*asking(files, copied, tmp_path / "out"), code=2))
    last.unlink()
    assert "unfinished:" in error_line(run(*asking(files, copied, tmp_path / "out2"), code=2))
    assert not (tmp_path / "out2").exists()


def test_a_half_written_index_goes_on_or_says_what_differs(files, index, copied):
    (copied / "index.json").unlink()
    (copied / "gradients" / "shard-000002.npy").unlink()
    refused = error_line(run(*building(files, copied, "--dim", 128), code=2))
    assert "holds an unfinished index made with other settings (dim: 256 then, 128 now)" in refused
    record = yaml.safe_load((copied / "run.yaml").read_text())
    assert record["options"]["dim"] == 256, "what was refused left no trace"
    made = json.loads(run(*building(files, copied, "--json")).stdout)
    assert made["resumed_rows"] == COUNT - 64
    for shard in sorted((index / "gradients").glob("*.npy")):
        assert shard.read_bytes() == (copied / "gradients" / shard.name).read_bytes()
    made = json.loads(run(*building(files, copied, "--dim", 128, "--overwrite", "--json")).stdout)
    assert (made["width"], made["resumed_rows"]) == (128, 0)


@pytest.fixture(scope="module")
def many_shards(files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("many") / "out"
    run(*building(files, out, "--shard-rows", 4))
    return out


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_index_resumes_to_the_same_bytes(files, many_shards, tmp_path, how):
    arguments = building(files, tmp_path / "out", "--shard-rows", 4)
    process = start(arguments)
    wait_for(tmp_path / "out" / "gradients" / "shard-000003.npy", process)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "resume at the first missing shard" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "out" / "index.json").exists()
    assert "unfinished:" in error_line(run(*asking(files, tmp_path / "out", tmp_path / "s"), code=2))
    resumed = json.loads(run(*arguments, "--json").stdout)
    assert 16 <= resumed["resumed_rows"] < COUNT
    for shard in sorted((many_shards / "gradients").glob("*.npy")):
        assert shard.read_bytes() == (tmp_path / "out" / "gradients" / shard.name).read_bytes()


def test_an_index_of_principal_axes_resumes_to_the_same_bytes_and_scores(files, exact, tmp_path):
    options = ("--projection", "pca", "--dim", 64, "--pca-sample", 40, "--shard-rows", 4)
    run(*building(files, tmp_path / "whole", *options))
    arguments = building(files, tmp_path / "out", *options)
    process = start(arguments)
    wait_for(tmp_path / "out" / "gradients" / "shard-000003.npy", process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    refused = error_line(run(*arguments, "--pca-sample", 41, code=2))
    assert "holds an unfinished index made with other settings (pca_sample: 40 then, 41 now)" in refused
    assert 16 <= json.loads(run(*arguments, "--json").stdout)["resumed_rows"] < COUNT
    for file in sorted((tmp_path / "whole" / "gradients").iterdir()):
        assert file.read_bytes() == (tmp_path / "out" / "gradients" / file.name).read_bytes()
    report = json.loads(run(*asking(files, tmp_path / "out", tmp_path / "s", "--candidates", 40, "--json")).stdout)
    assert 0 < report["scoring"]["coverage"] < 1
    found = read_scores(tmp_path / "s")
    known = dict(zip(exact["id"], exact["score"], strict=True))
    np.testing.assert_allclose(found["score"], [known[name] for name in found["id"]], rtol=1e-5)


def test_an_unknown_projection_is_refused_by_name(files, tmp_path):
    refused = run(*building(files, tmp_path / "out", "--projection", "svd"), code=2)
    assert "svd" in refused.stderr and "identity" in refused.stderr and not (tmp_path / "out").exists()


RANKING = {
    "shortlist": ["--mode", "shortlist", "--rank", 2, "--fraction", 0.05, "--curvature", "fisher", "--signal-check"],
    "top k": ["--top-k", 6, "--rank", 2],
    "planned top k": ["--top-k", 6],
    "index": [],
}
FALLS = """
import os, sys
from u2a_fast.store import files, journal

write, (file, number) = journal.write_atomically, sys.argv[1:3]
def fall(path, fill):
    if path.name == file:
        path.with_name(f".{path.name}.tmp").write_bytes(b"half")
        os.kill(os.getpid(), int(number))
    write(path, fill)
journal.write_atomically = fall
del sys.argv[1:3]
from u2a_fast.cli import app
app()
"""  # interrupts itself while it writes one file


def ranking(files: Path, index: Path, out: Path, kind: str) -> list[str]:
    command = asking(files, index, out) if kind == "index" else scoring(files, out)
    return [*command, *(str(a) for a in RANKING[kind]), "--window", "16", "--token-budget", "256"]


@pytest.mark.parametrize(
    ("kind", "file", "how", "rows"),
    [
        ("shortlist", "low-rank-pass-000002.parquet", signal.SIGINT, 32),
        ("shortlist", "rescoring-000003.parquet", signal.SIGKILL, COUNT + 48),
        ("top k", "low-rank-pass-000008.parquet", signal.SIGKILL, 128),
        ("top k", "rescoring-000001.parquet", signal.SIGKILL, COUNT + 16),
        ("planned top k", "sample-000001.parquet", signal.SIGKILL, 16),
        ("index", "rescoring-000004.parquet", signal.SIGINT, 64),
        ("index", "rescoring-000005.parquet", signal.SIGKILL, 80),
    ],
)
def test_an_interrupted_ranking_resumes_to_the_same_bytes(files, index, tmp_path, kind, file, how, rows):
    whole, out = tmp_path / "whole", tmp_path / "out"
    first = json.loads(run(*ranking(files, index, whole, kind), "--json").stdout)
    assert first["resumed_rows"] == 0 and not (whole / "parts").exists()
    arguments = ranking(files, index, out, kind)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FALLS, file, str(int(how)), *arguments]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert ended.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), ended.stderr
    if how == signal.SIGINT:
        assert "interrupted: run the same command again (without --overwrite)" in ended.stderr
    assert not (out / "scores.parquet").exists() and not (out / "parts" / file).exists()
    refused = error_line(run(*arguments, "--loss", "npo", code=2))
    assert "made with other settings (options.loss: 'ga' then, 'npo' now)" in refused
    assert "(options.window: 16 then, 33 now; window: 16 then, 33 now)" in error_line(
        run(*arguments, "--window", 33, code=2)
    )
    resumed = json.loads(run(*arguments, "--json").stdout)
    assert resumed["resumed_rows"] == rows
    assert {**resumed, "scores": "", "resumed_rows": 0} == {**first, "scores": ""}
    assert (out / "scores.parquet").read_bytes() == (whole / "scores.parquet").read_bytes()
    assert not (out / "parts").exists()


def test_overwrite_starts_an_interrupted_ranking_anew(files, index, tmp_path, monkeypatch):
    for kind in ("top k", "index"):
        out = tmp_path / kind
        arguments = ranking(files, index, out, kind)
        with monkeypatch.context() as patched:
            patched.setattr(sys.modules["u2a_fast.cli.scoring"], "write_scores", lambda *_, **__: 1 / 0)
            assert CliRunner().invoke(app, arguments).exception
        assert list((out / "parts").glob("rescoring-*.parquet"))
        made = json.loads(run(*arguments, "--seed", 1, "--overwrite", "--json").stdout)
        assert made["resumed_rows"] == 0 and not (out / "parts").exists()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("verb", ["top k", "index", "build"])
def test_a_run_stopped_while_it_ends_is_finished_by_the_next(files, index, tmp_path, monkeypatch, verb, after):
    out = tmp_path / "out"
    arguments = building(files, out) if verb == "build" else ranking(files, index, out, verb)
    last = "index.json" if verb == "build" else "scores.parquet"
    with monkeypatch.context() as patched:
        stop_at_the_end(patched, after)
        assert "interrupted:" in run(*arguments, code=130).stderr
    assert not (out / last).exists()
    made = json.loads(run(*arguments, "--json").stdout)
    assert made["resumed_rows"] >= (COUNT if verb != "index" else 256) and (out / last).exists()
    assert not (out / "parts").exists() and yaml.safe_load((out / "run.yaml").read_text())["result"] == made


def test_a_refused_build_overwrites_nothing(files, copied, tmp_path):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    negatives = tmp_path / "n.jsonl"
    negatives.write_text((files / "negatives.jsonl").read_text() + "{broken\n")
    for options, words in [
        (["--parameters", "norm"], "has no selected linear layer"),
        (["--parameters", "weights"], "or kinds out of"),
        (["--negatives", negatives, "--streaming"], "invalid JSON"),
    ]:
        assert words in run(*building(files, copied, "--overwrite", *options), code=2).stderr
        assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_two_runs_do_not_share_a_folder(files, index, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    unlock = lock_folder(out)
    for arguments in (scoring(files, out, "--top-k", 2), building(files, out), asking(files, index, out)):
        assert "another run is writing into" in error_line(run(*arguments, code=2))
        assert not list(out.iterdir())
    unlock()
    run(*building(files, out))
    assert "holds a run of 'index build'" in error_line(run(*scoring(files, out, "--top-k", 2), code=2))


def test_shares_of_tokens_and_modules(files, exact, tmp_path):
    run(*scoring(files, tmp_path / "out", "--per-token", "--per-module", "--window", 100))
    table = pq.read_table(tmp_path / "out" / "scores.parquet")
    rows = table.to_pylist()
    np.testing.assert_allclose([sum(row["token_scores"]) for row in rows], exact["score"], rtol=1e-4)
    np.testing.assert_allclose([sum(row["module_scores"].values()) for row in rows], exact["score"], rtol=1e-3)
    assert all(len(row["token_ids"]) == row["tokens"] for row in rows)
    run("select", "--scores", tmp_path / "out", "--k", 3, "--out", tmp_path / "s")
    assert read_selection(tmp_path / "s")["id"].tolist() == best_of(exact, 3)
    for options, words in [
        (["--per-token", "--mode", "lowrank"], "with --per-token, got 'lowrank'"),
        (["--per-module", "--top-k", 3], "with --per-module, got --top-k"),
    ]:
        assert words in error_line(run(*scoring(files, tmp_path / "no", *options), code=2))
        assert not (tmp_path / "no").exists()


def test_what_runs_measure_of_themselves_is_printed(files, index, tmp_path):
    text = run(*scoring(files, tmp_path / "a", "--mode", "layers", "--batch-invariant")).stdout
    assert re.search(r"^scoring layers: [01](, 1)?$", text, re.MULTILINE)
    assert re.search(r"^scoring batch invariant cost: \d", text, re.MULTILINE)
    text = run(*asking(files, index, tmp_path / "b", "--dtype", "bfloat16")).stdout
    assert re.search(r"^scoring float32 spearman: (0\.9|1$)", text, re.MULTILINE)
    lines = (files / "negatives.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:4]))
    few = ["--negatives", tmp_path / "few.jsonl", "--dtype", "bfloat16"]
    assert "scoring note: fewer than 8 negatives" in run(*scoring(files, tmp_path / "c", *few)).stdout

"""The benchmarks run on tiny cases, refuse to time what is wrong, and their tables are what the rows say; no times."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# benchmarks are no part of the installed package
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import all as all_benchmarks
from benchmarks import crossover, large, memory, routes, run, sanitize, score, slowest, tables, throughput, workloads
from benchmarks.rows import RESULTS
from u2a_fast import ops, testing
from u2a_fast.bench import machine
from u2a_fast.bench.cases import COMPOSITIONS, bare_product, timing_cases
from u2a_fast.bench.measure import Settings, measure
from u2a_fast.bench.rows import Row, make_row, read_rows, write_rows
from u2a_fast.bench.timing import Spread, alternate, ratios

ROOT = Path(__file__).resolve().parents[1]
QUICK = Settings(rounds=2, gemm=16, copy_bytes=1 << 12)
CASES = {
    (op, dtype): next(
        case
        for case in testing.CASES
        if (case.op, case.dtype, case.tangents, case.bias) == (op, dtype, ("h", "weight"), False)
        and testing.cost(case)[0] > 10_000
    )
    for op in ops.__all__
    for dtype in (torch.float32, torch.bfloat16)
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny() -> workloads.Workload:
    return workloads.llama(6, tokens=16, hidden=32, layers=2, ffn=64, heads=2, vocabulary=64)


@pytest.fixture(scope="module")
def scoring_row(tiny: workloads.Workload) -> Row:
    return score.measure(tiny, rounds=1, public=True)


@pytest.mark.parametrize("key", CASES, ids=lambda key: f"{key[0]}-{key[1]}")
def test_every_op_gives_a_row(key: tuple[str, torch.dtype], tmp_path: Path) -> None:
    row = measure(CASES[key], QUICK)
    assert isinstance(row, dict), row
    write_rows(tmp_path / "rows.jsonl", [row])
    (stored,) = read_rows(tmp_path / "rows.jsonl")
    assert stored == row
    assert stored["flops"] == testing.cost(CASES[key])[0]
    for name in ("seconds", "vs_reference", "vs_composition", "vs_product"):
        assert 0 < stored[name][0] <= stored[name][1] <= stored[name][2]
    assert {"machine", "threads", "versions", "commit", "command", "utc", "gate"} <= set(stored)


def test_a_wrong_op_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right, case = ops.ghost_dot, CASES["ghost_dot", torch.float32]
    monkeypatch.setattr(ops, "ghost_dot", lambda **arguments: right(**arguments) * (1 + 1e-3))
    found = measure(case, QUICK)
    assert isinstance(found, list) and "budget" in found[0]
    monkeypatch.setattr(run, "timing_cases", lambda device: (case,))
    assert run.main(["--quick"]) == 1
    assert "GATE FAILED" in capsys.readouterr().out


COMPOSED = [
    *(CASES[op, torch.float32] for op in ops.__all__),
    *(
        case
        for case in testing.CASES
        if case.dtype == torch.float32
        and (
            (case.op.startswith("attention") and (case.window or case.softcap))
            or (case.op == "attention_jvp" and case.sizes["K"] > 1)
            or (case.op == "glu_jvp" and case.tangents == ("h",) and case.sizes["N"] > 0)
        )
    ),
]


@pytest.mark.parametrize("case", COMPOSED, ids=lambda case: case.id)
def test_the_compositions_mean_what_the_ops_mean(case: testing.Case) -> None:
    op, arguments = case.op, testing.inputs(case)
    found = COMPOSITIONS[op](**arguments)
    found = found if isinstance(found, tuple) else (found,)
    wanted = testing.expected(case, arguments)
    # the compositions leave out what a caller would not ask for: log-sum-exps, the backward's bias gradient
    if op == "attention":
        wanted = wanted[:1]
    if op == "attention_jvp":
        wanted = wanted[0], wanted[2]
    if op == "linear_logprob_jvp":
        wanted = wanted[0], wanted[2][0]
    if op == "linear_logprob_backward":
        wanted = wanted[:2]
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))
    assert bare_product(case, arguments)[1] > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_timing_cases_are_whole(device: str) -> None:
    cases = timing_cases(device)
    assert {case.op for case in cases} == set(ops.__all__)
    assert len({case.id for case in cases}) == len(cases)
    assert all(sum(case.lengths) == case.sizes["N"] for case in cases if case.lengths)


def test_scoring_gives_a_row(scoring_row: Row) -> None:
    assert set(scoring_row["units"]) == set(tables.CONTESTANTS)
    assert scoring_row["units"]["forward"] == 1
    assert scoring_row["relative_error"] <= score.AGREEMENT
    assert scoring_row["examples"] == 6 and scoring_row["tokens"] == 6 * 16


def test_wrong_scores_are_not_timed(tiny: workloads.Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    one = score.PublicProcedure._one
    monkeypatch.setattr(score.PublicProcedure, "_one", lambda self, example: one(self, example) * 1.001)
    with pytest.raises(score.GateError, match="fp32 scores differ"):
        score.measure(tiny, rounds=1, public=False)


def test_bfloat16_that_ranks_otherwise_is_not_timed(tiny: workloads.Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "spearman", lambda x, y: 0.9)
    assert "bf16" not in score.measure(tiny, rounds=1, public=False)["units"]


def test_padding_leaves_the_public_procedure_alone(tiny: workloads.Workload) -> None:
    direction = tiny.direction()
    plain = score.PublicProcedure(tiny.model, direction)(tiny.examples)
    padded = score.PublicProcedure(tiny.model, direction, padded=24)(tiny.examples)
    torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


def test_hh_examples_are_those_of_the_public_procedure() -> None:
    if reason := workloads.hh_missing():
        pytest.skip(reason)
    workload = workloads.hh(3)
    assert [len(example["input_ids"]) <= workloads.HH_TOKENS for example in workload.examples] == [True] * 3
    assert all(example["labels"][-1] == example["input_ids"][-1] == 1 for example in workload.examples)


@pytest.mark.parametrize(("axis", "size"), [("vocabulary", 100), ("negatives", 30)])
def test_memory_point(axis: str, size: int) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("no /proc/self/clear_refs to reset the high-water mark with")
    found = memory.point(axis, size)
    assert found["passed"], found["gate"]
    assert found["size"] == size and found["peak_mib"] >= 0


def test_the_high_water_mark_sees_what_a_task_takes() -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("no /proc/self/clear_refs to reset the high-water mark with")
    peak = memory._peak(lambda: torch.ones(32 << 20, dtype=torch.uint8))
    assert 31 * memory.MIB <= peak <= 48 * memory.MIB


def test_sanitize_and_slowest_choose_and_run(tmp_path: Path) -> None:
    assert sanitize.main(["--device", "cpu", "--ops", "ghost_dot,linear_logprob"]) == 0
    first, second = timing_cases("cpu")[:2]
    rows = [
        make_row("ops", f"{case.id}-cpu", {"of_limit": share}, gate="") for case, share in ((first, 0.5), (second, 0.2))
    ]
    assert slowest.slowest(rows, "cpu") == second
    with pytest.raises(ValueError, match="expected rows of benchmarks.run on cuda"):
        slowest.slowest(rows, "cuda")
    write_rows(tmp_path / "rows.jsonl", rows)
    assert slowest.main(["--rows", str(tmp_path / "rows.jsonl"), "--profile"]) == 0
    write_rows(tmp_path / "others.jsonl", [make_row("ops", "another-cpu", {"of_limit": 0.1}, gate="")])
    with pytest.raises(SystemExit):
        slowest.main(["--rows", str(tmp_path / "others.jsonl")])


def test_crossover_reads_both_constants_from_the_times() -> None:
    seconds = {1: 2.0, **{k: 2.0 / 128 * (1.5 * 128 + 12 * k) for k in (4, 8, 16)}}
    assert crossover.line(128, seconds) == pytest.approx((1.5, 12))
    rows = list(crossover.crossover_rows(2, tokens=64, examples=2, layers=((16, 24),)))
    assert [row["case"].split("-")[3] for row in rows] == ["float32", "bfloat16"]
    assert all(set(row["units"]) == {"1", "4", "8", "16"} for row in rows)


def test_a_newer_row_replaces_the_older(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [make_row("ops", "a", {"x": 1}, gate=""), make_row("ops", "b", {"x": 2}, gate="")])
    write_rows(path, [make_row("ops", "a", {"x": 3}, gate="")])
    assert [(row["case"], row["x"]) for row in read_rows(path)] == [("a", 3), ("b", 2)]


def test_threads_make_another_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert make_row("ops", "a", {}, gate="")["case"] == "a-2threads"
    assert make_row("ops", "a", {}, gate="")["threads"] == 2


def test_all_measures_every_benchmark_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def record(command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        assert env["OMP_NUM_THREADS"] == "1"
        return subprocess.CompletedProcess(command, int("benchmarks.memory" in command))

    results_file = machine.ROOT / "benchmarks" / "results" / "x.jsonl"
    monkeypatch.setattr(all_benchmarks, "results_file", lambda row: results_file)
    monkeypatch.setattr(all_benchmarks.subprocess, "run", record)
    monkeypatch.setattr(all_benchmarks.tables, "main", lambda argv: 0)
    monkeypatch.setattr(all_benchmarks, "describe", lambda device: {})
    assert all_benchmarks.main() == 1, "one of them failed"
    assert [command[2] for command in commands] == [
        f"benchmarks.{name}" for name in ("routes", "score", "memory", "modes", "crossover", "run")
    ]
    assert all(command[3:] == ["--out", str(results_file)] for command in commands)


def test_a_command_names_no_folder() -> None:
    argv = [str(ROOT / "benchmarks" / "run.py"), "--quick", "--out", "/some/where/rows.jsonl"]
    assert machine.command(argv) == "python -m benchmarks.run --quick --out rows.jsonl"


def test_contestants_take_turns() -> None:
    order: list[str] = []
    samples = alternate(
        {"x": lambda _: order.append("x"), "y": lambda _: order.append("y")}, rounds=3, sample_seconds=0
    )
    assert {name: len(times) for name, times in samples.items()} == {"x": 3, "y": 3}
    assert order[-6:] == ["x", "y", "y", "x", "x", "y"]
    assert ratios([2.0, 4.0, 6.0], [1.0, 1.0, 2.0]).to_list() == Spread.of([2.0, 4.0, 3.0]).to_list()


def test_committed_tables_are_what_the_rows_say() -> None:
    assert tables.main(["--check"]) == 0


def test_committed_rows_passed_their_gate_and_name_no_place() -> None:
    for row in read_rows(RESULTS):
        assert row["gate"] and row["commit"] and row["versions"]["torch"]
        assert "/home" not in json.dumps(row) and str(ROOT.parent) not in json.dumps(row)


def test_tables_from_rows(
    tmp_path: Path, tiny: workloads.Workload, scoring_row: Row, capsys: pytest.CaptureFixture[str]
) -> None:
    ops_row = measure(CASES["ghost_dot", torch.float32], QUICK)
    assert isinstance(ops_row, dict)
    points = [make_row("memory", "vocabulary-9", {"axis": "vocabulary", "size": 9, **_mib()}, gate="yes")]
    points.append(make_row("memory", "negatives-7", {"axis": "negatives", "size": 7, "peak_mib": 3.0}, gate="yes"))
    routes_row, green = routes.BUILDERS["llama"](tiny, 1)
    assert green and set(routes_row["units"]) == {"forward fp32", "reverse fp32", "forward bf16", "reverse bf16"}
    points += [*crossover.crossover_rows(2, tokens=64, examples=2, layers=((16, 24),)), _modes_row()]
    points += [routes_row] + [make_row("peers", f"tiny-{row['label']}", row, gate="yes") for row in _peer_rows()]
    page, rows = tmp_path / "page.md", tmp_path / "rows"
    write_rows(rows / "machine.jsonl", [scoring_row, ops_row, *points])
    page.write_text("".join(f"<!-- table: {name} -->\nold\n<!-- /table -->\n" for name in tables.TABLES))
    assert tables.main(["--check"], pages=[page], results=rows) == 1
    assert "stale" in capsys.readouterr().out
    assert tables.main([], pages=[page], results=rows) == 0
    assert tables.main(["--check"], pages=[page], results=rows) == 0
    text = page.read_text()
    assert "public U2A procedure, padded" in text and "| 9 | 3 | 4 |" in text and "at most 3.1" in text
    assert "| one direction, 20 M Llama: forward fp32 |" in text
    assert "| **u2a_fast, reverse** | 3.00 (2.90 to 3.20) | 2.50 |" in text and "* other (thing 1.0): it broke" in text
    assert (
        "| low rank 16 | 0.9900 | energy 0.70 |" in text
        and "| certified top k, rank 16, k = 1 | 1 by proof | 50%" in text
    )
    assert "| index, pca, 64 entries a negative | 0.7500 |" in text and "| `16-24-64x2-float32` |" in text
    assert text.count(tables.EMPTY) == 5, "only the GPU has no rows"
    with pytest.raises(ValueError, match="expected a table out of"):
        tables.render("<!-- table: other -->\n<!-- /table -->", [])


def test_peers_on_a_device_have_a_table_of_their_own() -> None:
    more = {"device": "cuda", "device_mib": 1234.0, "batch": None, "norm_error": 2e-3}
    rows = [{"benchmark": "peers", "gate": "yes", **row, **more} for row in _peer_rows()]
    select, table = tables.TABLES["peers-cuda"]
    assert select(rows) == rows and not tables.TABLES["peers"][0](rows)
    text = table(rows)
    assert "| **u2a_fast, reverse** | 3.00 (2.90 to 3.20) | 2.00 | its own | 1,234 | 2e-03 (all) | 1.0000 |" in text
    assert "* other (thing 1.0): it broke" in text


def test_goals_against_peers_come_from_their_rows() -> None:
    def row(name: str, units: float, error: float, spearman: float = 1.0, truth: str = "all") -> Row:
        agreement = {"truth": truth, "relative_error": error, "spearman": {"all": spearman}}
        named = {"case": f"tiny-{name}", "workload": "tiny", "label": name, "error": None}
        return named | agreement | {"units": [units, units, units]}

    rows = [
        row("u2a_fast-forward", 2.0, 1e-6),
        row("u2a_fast-forward_bf16", 0.8, 1e-2, 0.9995) | {"norm_error": 0.02},
        row("u2a_fast-lowrank", 1.5, 1e-1, 0.9),
        row("slow", 5.0, 1e-6),
        row("linears", 3.0, 1e-6, truth="linears"),
        row("norms", 0.5, 1e-6, truth="norms"),
        row("bergson-16", 1.0, 0.5, 0.25),
        {"case": "tiny-broken", "workload": "tiny", "label": "broken", "error": "it broke"},
    ]
    rounded = [{**row, "dtype": "bfloat16", "norm_error": 1e-2} for row in rows if "truth" in row]
    assert "slow, the fastest exact peer" not in tables._peer_goals(rounded, least=2)
    assert "| at least 2 | 1.5 | **no** |" in tables._peer_goals(rows, least=2)
    assert tables._peer_goals(rows).splitlines()[2:] == [
        "| `tiny`: linears, the fastest exact peer, over exact u2a_fast | at least 1.15 | 1.5 | yes |",
        "| `tiny`: bergson-16, over u2a_fast, low-rank direction | at least 1 | 0.6667 | **no** |",
        "| `tiny`: Spearman of that low rank (that projection: 0.25) | at least 0.98 | 0.9 | **no** |",
        "| `tiny`: exact u2a_fast, float32 over bfloat16 | at least 3 | 2.5 | **no** |",
        "| `tiny`: relative error of that bfloat16 (of the norm) | at most 0.01 | 0.02 | **no** |",
        "| `tiny`: its Spearman | at least 0.999 | 0.9995 | yes |",
    ]


@pytest.fixture
def tiny_config(tmp_path: Path) -> str:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 64}
    config = {"model_type": "llama", **sizes, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path / "config.json")


def test_throughput_gives_a_row(tiny_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--like", tiny_config, "--device", "cpu", "--tokens", "16", "--batch", "2", "--rounds", "2"]
    assert throughput.main([*argv, "--out", str(tmp_path / "rows.jsonl")]) == 0
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert (row["layers"], row["tokens"], row["batch"]) == (3, 16, 2)
    assert set(row["units"]) == set(row["tokens_per_second"]) == {"forward", "reverse"}
    lines = tables._throughput([row]).splitlines()
    assert len(lines) == 4 and "2 examples of 16 tokens" in lines[2] and lines[2].endswith("% |")
    assert "tokens/s" in capsys.readouterr().out


def test_a_route_that_lacks_memory_leaves_the_other_its_row(
    tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alternate = throughput.alternate
    turns = iter([alternate, _out_of_memory])
    monkeypatch.setattr(throughput, "alternate", lambda *args, **options: next(turns)(*args, **options))
    argv = ["--like", tiny_config, "--device", "cpu", "--tokens", "16", "--batch", "2", "--rounds", "2"]
    assert throughput.main([*argv, "--out", str(tmp_path / "rows.jsonl")]) == 1
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert set(row["units"]) == {"forward"}
    assert "reverse: NOT TIMED: OutOfMemoryError: 9 GiB" in capsys.readouterr().out


def _out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("9 GiB")


@pytest.mark.parametrize("benchmark", [run, large], ids=["run", "large"])
def test_a_case_that_raises_takes_no_others_turn(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, calls = benchmark.measure, []

    def first_raises(case: Any, *args: Any, **options: Any) -> Any:
        calls.append(case)
        return _out_of_memory() if len(calls) == 1 else right(case, *args, **options)

    monkeypatch.setattr(benchmark, "measure", first_raises)
    argv = ["--quick", "--filter", "rotary"]
    if benchmark is large:
        argv = ["--scale", "0.01", "--rounds", "2", "--gemm", "256", "--filter", "attention"]
    assert benchmark.main([*argv, "--device", "cpu", "--out", str(tmp_path / "rows.jsonl")]) == 1
    assert len(read_rows(tmp_path / "rows.jsonl")) == len(calls) - 1 >= 1
    assert "NOT TIMED: OutOfMemoryError: 9 GiB" in capsys.readouterr().out


def test_wrong_derivatives_have_no_throughput(tiny_config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = throughput.float64_scores
    monkeypatch.setattr(throughput, "float64_scores", lambda *arguments: right(*arguments) * 1.001)
    assert throughput.main(["--like", tiny_config, "--device", "cpu"]) == 1


def _peer_rows() -> list[dict[str, Any]]:
    common = {"workload": "tiny", "parameters": 1000, "package": None, "error": None, "judged_examples": 9}
    timed = {
        "examples_per_second": 2.0,
        "units": [2.9, 3.0, 3.2],
        "cpu_units": [2.0, 2.5, 3.0],
        "peak_mib": 5.0,
        "lines": 4,
    }
    agreement = {"truth": "all", "relative_error": 1e-6, "pearson": {"all": 1.0}, "spearman": {"all": 1.0}}
    return [
        common | timed | {"label": "forward pass"},
        common | timed | agreement | {"label": "u2a_fast, reverse"},
        common | {"label": "other", "package": "thing==1.0", "error": "it broke"},
    ]


def _modes_row() -> Row:
    values = {
        "examples": 8,
        "lowrank": {"16": {"spearman": 0.99, "energy": 0.7}},
        "layers": {"0.5": {"spearman": 0.9, "layers": [1]}},
        "shortlist": {"rescored": 4, "recall": 1.0, "recall_interval": [0.5, 1.0]},
        "certified": {"rank 16, k = 1": 0.5},
        "index": {
            "linear": {"spearman": 0.8},
            "pca": {"width": 64, "spearman": 0.75, "spearman_linear": 0.9, "coverage": 0.5, "recall": {"1": 1.0}},
        },
    }
    return make_row("modes", "tiny", values, gate="yes")


def _mib() -> dict[str, float]:
    return {"peak_mib": 3.0, "plain_forward_mib": 4.0, "logits_mib": 2.0, "weights_mib": 1.0}


class _Parsed(Exception):
    pass


def test_the_gpu_script_gives_every_command_arguments_that_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, tools = tmp_path / "commands", tmp_path / "tools"
    tools.mkdir()
    for name in ("python", "compute-sanitizer", "ncu"):
        (tools / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>"{log}"\n')
        (tools / name).chmod(0o755)
    (tmp_path / "gpu.jsonl").write_text("{}\n")
    chosen = {"PYTHON": str(tools / "python"), "OUT": str(tmp_path), "WHEELS": str(tmp_path), "PEERS": "1"}
    environment = {**os.environ, **chosen, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    def parse(parser: argparse.ArgumentParser, argv: Any) -> None:
        parse_args(parser, argv)
        raise _Parsed

    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    seen = set()
    for line in log.read_text().splitlines():
        if found := re.search(r"-m (benchmarks\.\w+)(.*)", line):
            seen.add(found[1])
            module = importlib.import_module(f"{found[1]}.__main__" if found[1].endswith("peers") else found[1])
            with pytest.raises(_Parsed):
                module.main(found[2].split())
    assert seen == {f"benchmarks.{name}" for name in ("large", "throughput", "sanitize", "run", "slowest", "peers")}


def test_large_workloads_give_rows_and_goals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--device", "cpu", "--scale", "0.002", "--rounds", "1", "--gemm", "64", "--filter", "attention"]
    assert large.main([*argv, "--out", str(tmp_path / "rows.jsonl")]) == 0
    rows = read_rows(tmp_path / "rows.jsonl")
    assert {row["case"] for row in rows} == {f"attention_jvp-E{e}-T{t}-cpu" for e in (64, 128) for t in (2048, 8192)}
    assert all({"op over forward", "forward over sdpa forward"} <= row["ratios"].keys() for row in rows)
    assert "E128-T8192" in capsys.readouterr().out
    table = tables._large(rows).splitlines()
    assert len(table) == 2 + len(rows)
    assert "op over forward" in table[2]
    measured = [{**row, "case": row["case"].replace("-cpu", "-cuda")} for row in rows]
    goals = tables._goals(measured)
    assert goals.count("attention's tangent over its forward") == len(rows)


def test_a_wrong_large_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = large.ops.attention_jvp
    monkeypatch.setattr(large.ops, "attention_jvp", lambda *given: [x * 1.1 for x in right(*given)])
    argv = ["--device", "cpu", "--scale", "0.002", "--rounds", "1", "--gemm", "64", "--filter", "attention"]
    assert large.main(argv) == 1

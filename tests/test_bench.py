"""``u2a-fast bench`` on tiny shapes: which cases, which rows, what counts as a change, and every refusal; no times."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from u2a_fast import ops, testing
from u2a_fast.bench import machine
from u2a_fast.bench.compare import compare
from u2a_fast.bench.measure import Settings
from u2a_fast.bench.models import MODELS, Layer, build, layers, model_config
from u2a_fast.bench.roofline import draw_roofline
from u2a_fast.bench.rows import Row, bandwidth, read_rows, write_rows
from u2a_fast.bench.shapes import GATE_FLOPS, LAYER_LETTERS, TIMED, letters, parse_shape, sized
from u2a_fast.cli import app

FP32 = (torch.float32,)
TINY = ("--op", "ghost_dot", "--shape", "N=20,I=8,O=6", "--lengths", "8")

# As published with the checkpoints.
PARAMETERS = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "google/gemma-3-4b-pt": 3_880_263_168,
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
    "openai-community/gpt2-xl": 1_557_611_200,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ceilings of no size, and the threads that were there."""
    monkeypatch.setattr(Settings, "of", classmethod(lambda cls, device, quick: cls(device, 2, 16, 1 << 12)))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bench(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result


def listed(*arguments: object) -> list[str]:
    return [case["case"] for case in json.loads(bench("list", "--json", *arguments).stdout)["cases"]]


def example_row(case: str = "x-float32-cpu", seconds: float = 1.0, width: float = 1.02, **more: Any) -> Row:
    return {
        "benchmark": "ops",
        "case": case,
        "machine": "M",
        "device": "cpu",
        "threads": 1,
        "op": "x",
        "dtype": "float32",
        "flops": 4_000_000,
        "bytes": 1_000_000,
        "gflops": 0.004,
        "gemm_gflops": 8.0,
        "copy_gbytes": 3.0,
        "triad_gbytes": 4.0,
        "seconds": [seconds / width, seconds, seconds * width],
        "yardstick_seconds": {"reference": 3.0, "composition": 2.0, "product": 1.0},
        **more,
    }


# Which cases


def test_the_list_is_the_case_table() -> None:
    assert listed("--device", "cpu") == [case.id for case in testing.TIMING_CASES]
    chosen = listed("--device", "cpu", "--op", "ghost_norm", "--dtype", "bf16")
    assert chosen and all(name.startswith("ghost_norm-") and name.endswith("bfloat16") for name in chosen)
    assert "ghost_norm" in bench("list", "--op", "ghost_norm").stdout


def test_a_shape_is_what_was_asked_for() -> None:
    (case,) = sized(["ghost_dot"], FP32, "cpu", shapes=[parse_shape("N=300, I=8,O=6,K=2")])
    assert case.sizes == {"N": 300, "B": 3, "I": 8, "O": 6, "K": 2} and case.lengths == (128, 128, 44)
    (case,) = sized(["ghost_dot"], FP32, "cpu", shapes=[{"I": 8, "O": 6}], lengths=(3, 1, 5))
    assert case.sizes == {"N": 9, "B": 3, "I": 8, "O": 6, "K": 1} and case.lengths == (3, 1, 5)
    arguments = testing.inputs(case)
    assert arguments["a"].shape == (9, 8) and arguments["cu_seqlens"].tolist() == [0, 3, 4, 9]


def test_every_op_can_be_sized() -> None:
    for op in TIMED:
        shape = dict.fromkeys(LAYER_LETTERS.intersection(letters(op)), 8)
        cases = sized([op], FP32, "cpu", shapes=[shape], tokens=5, lengths=(2,))
        assert cases and len({case.id for case in cases}) == len(cases)
        for case in cases:
            assert case.sizes["N"] == 5 and all(case.sizes[letter] == 8 for letter in shape)
            arguments = testing.inputs(case)
            assert testing.violations(case, arguments, getattr(ops, op)(**arguments)) == []


def test_ops_without_a_name_are_those_that_fit() -> None:
    found = {case.op for case in sized([], FP32, "cpu", shapes=[{"N": 4, "D": 8, "V": 9}])}
    assert "linear_logprob" in found and all({"D", "V"} <= set(letters(op)) for op in found)


def test_tokens_that_nobody_asked_for_stay_within_the_gates_reach() -> None:
    head = [Layer({"D": 4096, "V": 128256})]
    for device, most in GATE_FLOPS.items():
        for case in sized(["linear_logprob", "linear_logprob_jvp"], FP32, device, model=head):
            assert testing.cost(case)[0] <= most or case.sizes["N"] == 32
    (case,) = sized(["linear_logprob"], FP32, "cpu", model=head, tokens=5000)
    assert case.sizes["N"] == 5000, "what was asked for is never cut"


# Models


@pytest.mark.parametrize("name", MODELS)
def test_built_in_models_have_the_published_number_of_parameters(name: str) -> None:
    assert sum(parameter.numel() for parameter in build(model_config(name)).parameters()) == PARAMETERS[name]


def test_a_config_file_gives_the_layers_of_its_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=33, head_dim=6,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    model = LlamaForCausalLM(config)
    linear = {(m.in_features, m.out_features) for m in model.model.modules() if isinstance(m, nn.Linear)}
    for path in (tmp_path, tmp_path / "config.json"):
        found = [layer.sizes for layer in layers(model_config(str(path)))]
        assert {(sizes["I"], sizes["O"]) for sizes in found if "I" in sizes} == linear
        assert {"D": 24, "V": 33} in found and {"H": 4, "G": 2, "E": 6, "F": 6} in found
    names = listed("--like", tmp_path, "--tokens", 16, "--dtype", "fp32", "--op", "ghost_dot", "--op", "linear_logprob")
    assert len(names) == len(linear) + 1 and "linear_logprob-N16-D24-V33-float32" in names


def test_models_by_the_names_that_people_type() -> None:
    wanted = model_config("meta-llama/Llama-3.2-1B").to_dict()
    for name in ("llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", "unsloth/Llama-3.2-1B"):
        assert model_config(name).to_dict() == wanted
    assert [layer.sizes for layer in layers(model_config("gpt2"))][0] == {"I": 768, "O": 2304}, "fused, as it is built"
    attention = {"H": 8, "G": 4, "E": 256, "F": 256}
    assert layers(model_config("gemma-2-2b-it"))[-3:] == [
        Layer({"D": 2304, "V": 256000}, {"softcap": 30.0}),
        Layer(attention, {"window": 4096, "softcap": 50.0}),
        Layer(attention, {"window": 0, "softcap": 50.0}),
    ]


@pytest.mark.parametrize(("length", "window"), [(64, 32), (32, 0)])
def test_a_window_is_timed_where_it_hides_something(length: int, window: int) -> None:
    layer = Layer({"H": 2, "G": 1, "E": 8, "F": 8}, {"window": 32, "softcap": 5.0})
    cases = sized(["attention"], [torch.float32], "cpu", model=[layer], lengths=(length,))
    alone, shared = cases
    assert (alone.parent, alone.window, alone.softcap) == (None, window, 5.0)
    assert shared.parent is not None and shared.window == 32, "the answers of a prompt see both"


# Running


def test_run_writes_rows_and_a_plot(tmp_path: Path) -> None:
    out, plot = tmp_path / "new" / "rows.jsonl", tmp_path / "roofline.svg"
    result = bench("run", *TINY, "--threads", 1, "--device", "cpu", "--out", out, "--plot", plot)
    rows = read_rows(out)
    assert [row["case"] for row in rows] == [f"ghost_dot-N20-I8-O6-K1-8,8,4-{d}-cpu" for d in ("bfloat16", "float32")]
    assert "of limit" in result.stdout and rows[0]["case"] in result.stdout
    for row in rows:
        assert row["gate"] and row["machine"] and row["versions"]["torch"] and row["commit"] and row["command"]
        assert row["flops"] == 2 * 20 * 8 * 6 and row["rounds"] == 2 and row["triad_gbytes"] > 0
    assert plot.read_text().startswith("<?xml")
    bench("roofline", out, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")
    assert "0 of 2 cases became slower" in bench("compare", out, out).stdout


def test_run_as_json(tmp_path: Path) -> None:
    found = json.loads(bench("run", *TINY, "--dtype", "fp32", "--rounds", 3, "--json", "--device", "cpu").stdout)
    assert [row["rounds"] for row in found["rows"]] == [3] and found["wrong"] == {}


def test_a_wrong_op_gives_no_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = ops.ghost_dot
    monkeypatch.setattr(
        ops, "ghost_dot", lambda a, **rest: right(a, **rest) * (1.01 if a.dtype == torch.float32 else 1.0)
    )
    result = bench("run", *TINY, "--device", "cpu", "--out", tmp_path / "rows.jsonl", code=1)
    assert "float32: wrong, not timed: output 0: error" in result.stderr
    assert [row["dtype"] for row in read_rows(tmp_path / "rows.jsonl")] == ["bfloat16"]


def test_an_interrupted_run_keeps_what_it_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right, seen = ops.ghost_dot, set()

    def interrupted(a: torch.Tensor, **rest: Any) -> torch.Tensor:
        seen.add(a.dtype)
        if len(seen) > 1:
            raise KeyboardInterrupt
        return right(a, **rest)

    monkeypatch.setattr(ops, "ghost_dot", interrupted)
    result = bench("run", *TINY, "--device", "cpu", "--out", tmp_path / "rows.jsonl", code=130)
    assert [row["dtype"] for row in read_rows(tmp_path / "rows.jsonl")] == ["float32"]
    assert "ghost_dot" in result.stdout and "are in --out" in result.stderr


def test_a_run_adds_to_the_rows_that_are_there(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    write_rows(out, [example_row()])
    bench("run", *TINY, "--dtype", "fp32", "--device", "cpu", "--out", out)
    assert {row["case"] for row in read_rows(out)} >= {"x-float32-cpu"} and len(read_rows(out)) == 2


# Comparing


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ({}, {}, "same"),
        ({}, {"seconds": 1.04}, "same"),  # below the threshold
        ({}, {"seconds": 1.2}, "slower"),
        ({}, {"seconds": 0.8}, "faster"),
        ({}, {"seconds": 1.2, "width": 1.2}, "same"),  # within the noise
        ({"width": 1.2}, {"seconds": 1.2}, "same"),
        (
            {},
            {
                "seconds": 1.2,
                "gemm_gflops": 8 / 1.2,
                "yardstick_seconds": {"reference": 3.6, "composition": 2.4, "product": 1.2},
            },
            "machine",
        ),
        (
            {},
            {
                "seconds": 1.6,
                "gemm_gflops": 8 / 1.2,
                "yardstick_seconds": {"reference": 3.6, "composition": 2.4, "product": 1.2},
            },
            "slower",  # by more than the machine became
        ),
    ],
)
def test_what_counts_as_a_change(old: dict[str, Any], new: dict[str, Any], verdict: str) -> None:
    before, now = example_row(**old), example_row(**new)
    (change,) = compare([before], [now]).changes
    assert change.verdict == verdict
    (back,) = compare([now], [before]).changes
    assert back.verdict == {"slower": "faster", "faster": "slower"}.get(verdict, verdict)


def test_rows_without_yardsticks_are_compared_as_measured() -> None:
    before, now = ({k: example_row(seconds=s)[k] for k in ("benchmark", "case", "machine", "seconds")} for s in (1, 2))
    assert compare([before], [now]).changes[0].verdict == "slower"


def test_a_regression_is_an_exit_status(tmp_path: Path) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    write_rows(old, [example_row("a"), example_row("b"), example_row("c", machine="N"), example_row("d")])
    write_rows(new, [example_row("a", 1.3), example_row("b"), example_row("c"), example_row("e")])
    result = bench("compare", old, new, code=1)
    assert "1 of 2 cases became slower" in result.stdout
    assert "not comparable: c: measured on M, the other file's on N" in result.stdout
    assert "not comparable: d: only in the old file" in result.stdout
    assert "not comparable: e: only in the new file" in result.stdout
    assert "0 of 2" in bench("compare", old, new, "--threshold", 0.5).stdout
    found = json.loads(bench("compare", old, new, "--json", code=1).stdout)
    assert found["regressions"] == 1 and {change["case"] for change in found["changes"]} == {"a", "b"}


def test_the_faster_of_copy_and_triad_is_the_memorys_rate() -> None:
    assert bandwidth(example_row()) == 4.0
    assert bandwidth({"case": "older", "copy_gbytes": 3.0}) == 3.0


def test_a_panel_for_every_machine(tmp_path: Path) -> None:
    draw_roofline([example_row()], tmp_path / "one.png")
    draw_roofline([example_row(), example_row(machine="N")], tmp_path / "two.png")
    one, two = (int.from_bytes((tmp_path / f"{name}.png").read_bytes()[16:20]) for name in ("one", "two"))
    assert two == 2 * one


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "--op", "nope"), "[bench] expected --op out of ghost_dot"),
        (("run", "--op", "nope"), "got 'nope'"),
        (("list", "--shape", "N:3"), "[bench] expected --shape as letters and sizes"),
        (("list", "--shape", "I=0,O=3"), "got 'I=0,O=3'"),
        (("list", "--shape", "I=1,I=2,O=3"), "each letter once"),
        (("list", "--shape", "Q=3"), "got Q=3"),
        (("list", "--op", "ghost_dot", "--shape", "I=3"), "(ghost_dot: N I O K), got I=3"),
        (("list", "--op", "linear_logprob", "--shape", "I=3,O=3"), "(linear_logprob: N D V), got I=3,O=3"),
        (("list", "--op", "ghost_dot", "--op", "linear_logprob", "--shape", "I=3,O=3"), "(linear_logprob: N D V)"),
        (("list", "--shape", "I=3,O=3", "--lengths", "8,x"), "[bench] expected --lengths as tokens"),
        (("list", "--shape", "N=9,I=3,O=3", "--tokens", "8"), "got 9 (--shape) and 8 (--tokens)"),
        (("list", "--shape", "N=9,I=3,O=3", "--lengths", "4,4"), "got 9 (--shape) and 8 (--lengths)"),
        (("list", "--tokens", "8"), "with --shape or --like"),
        (("list", "--dtype", "fp16"), "for float16, which has no cases of its own"),
        (("list", "--like", "meta-llama/Llama-3.2-2B"), "(meta-llama/Llama-3.2-"),
        (("list", "--shape", f"N={2**31},I=3,O=3"), "[bench] expected --shape as letters and sizes"),
        (("list", "--like", "", "--op", "ghost_dot"), "[bench] expected a config.json"),
        (("list", "--shape", "I=3,O=3", "--lengths", ""), "[bench] expected --lengths as tokens"),
        (("list", "--shape", "I=3,O=3", "--lengths", f"{10**30}"), "[bench] expected --lengths as tokens"),
        (("list", "--shape", "I=3,O=3", "--tokens", f"{10**30}"), "less than or equal to 2147483647"),
        (("run", "--threads", "1000000", *TINY), "--threads, the machine's, got 1000000"),
        (("list", "--like", "no/such-model"), "or a path of a config.json, got 'no/such-model'"),
        (("run", "--plot", "x.gif", *TINY), "named .png or .svg, got 'x.gif'"),
        (("compare", "absent.jsonl", "absent.jsonl"), "no such file: absent.jsonl"),
        (("roofline", "absent.jsonl", "x.png"), "no such file: absent.jsonl"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    assert message in bench(*arguments, code=2).stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "at least one row in"),
        ("\n\n", "at least one row in"),
        ("{\n", "line 1"),
        ('["a"]\n', "a row with machine, benchmark and case"),
        ('{"machine": "M", "benchmark": "ops"}\n', "a row with machine, benchmark and case"),
        (json.dumps(example_row()) + "\n" + json.dumps(example_row(gflops=float("nan"))), "the number NaN"),
        (json.dumps(example_row())[:-9], "a row as a JSON object"),
        (json.dumps(example_row(seconds=0.0)), "3 rising percentiles in the row of x-float32-cpu"),
        (json.dumps({**example_row(), "seconds": [1, 2]}), "3 rising percentiles"),
        (json.dumps(example_row(gemm_gflops=0)), "gemm_gflops above 0"),
        (json.dumps(example_row(yardstick_seconds={"product": 0})), "product above 0 in the row of x-float32-cpu"),
        (json.dumps(example_row(yardstick_seconds=3.0)), "yardstick_seconds by name"),
        (json.dumps({"machine": "M", "benchmark": "memory", "case": "c"}), "none has times"),
    ],
)
def test_files_that_hold_no_measurement(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    assert message in bench("compare", tmp_path / "rows.jsonl", tmp_path / "rows.jsonl", code=2).stderr


def test_a_plot_needs_rows_of_ops(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"machine": "M", "benchmark": "memory", "case": "c"}])
    assert "rows of ops to draw" in bench("roofline", tmp_path / "a.jsonl", tmp_path / "x.png", code=2).stderr
    write_rows(tmp_path / "b.jsonl", [example_row(copy_gbytes=-1)])
    assert "copy_gbytes above 0" in bench("roofline", tmp_path / "b.jsonl", tmp_path / "x.png", code=2).stderr
    write_rows(tmp_path / "c.jsonl", [example_row(dtype=None)])
    assert "expected dtype in the row" in bench("roofline", tmp_path / "c.jsonl", tmp_path / "x.png", code=2).stderr
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a config.json"),
        ("[]", "expected a model_type"),
        ('{"model_type": "nonesuch"}', "that transformers can read"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "Field 'hidden_size' expected int"),
        ('{"model_type": "llama", "vocab_size": -3}', "causal language model"),
        ('{"model_type": "vit"}', "causal language model"),
    ],
)
def test_configs_of_no_model(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    line = bench("list", "--like", tmp_path / "config.json", code=2).stderr.strip().splitlines()[-1]
    assert line.startswith("error: [bench]") and message in line


def test_what_cannot_be_written_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(testing, "inputs", lambda *_: pytest.fail("work began"))
    assert "got the folder" in bench("run", *TINY, "--out", tmp_path, code=2).stderr
    (tmp_path / "rows.jsonl").write_text("no rows\n")
    assert "line 1" in bench("run", *TINY, "--out", tmp_path / "rows.jsonl", code=2).stderr
    for name in ("--out", "--plot"):
        assert "rows.jsonl" in bench("run", *TINY, name, tmp_path / "rows.jsonl" / "x.png", code=2).stderr
    if not torch.cuda.is_available():
        assert "expected a CUDA device" in bench("run", *TINY, "--device", "cuda", code=2).stderr


def test_a_case_that_memory_does_not_hold_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "inputs", lambda *_: torch.empty(2**60))
    assert "DefaultCPUAllocator" in bench("run", *TINY, code=2).stderr


# Where a row comes from


def test_the_commit_outside_of_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    assert machine.commit() == "unknown"
    monkeypatch.setenv("BENCH_COMMIT", "abc")
    assert machine.commit() == "abc"


def test_the_command_as_one_would_type_it() -> None:
    argv = ["/somewhere/bin/u2a-fast", "bench", "run", "--like", "gpt2/x", "--out", "/some/where/rows.jsonl"]
    assert machine.command(argv) == "u2a-fast bench run --like gpt2/x --out rows.jsonl"
    assert machine.command([str(machine.ROOT / ".venv" / "bin" / "u2a-fast"), "bench"]) == "u2a-fast bench"

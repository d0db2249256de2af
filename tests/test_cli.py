"""The command line on a tiny model: every verb, its refusals, and what interruption leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_files import save_tiny_model, tiny_model
from typer.testing import CliRunner

from u2a_fast.cli import app
from u2a_fast.manifest import RunRecord
from u2a_fast.models.loading import load_model
from u2a_fast.store import lock_folder, read_scores, read_selection

RUN = [sys.executable, "-c", "from u2a_fast.cli import app; app()"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model, negatives and the three kinds of objective data; read, never written."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "model")
    write_rows(
        folder / "negatives.jsonl", [{"id": f"n{i}", "prompt": f"q {i}", "response": f"no {i}"} for i in range(40)]
    )
    write_rows(
        folder / "preferences.jsonl", [{"prompt": f"p {i}", "chosen": "yes", "rejected": f"no {i}"} for i in range(8)]
    )
    write_rows(folder / "positives.jsonl", [{"prompt": f"p {i}", "response": f"yes {i}"} for i in range(8)])
    write_rows(folder / "rewards.jsonl", [{"prompt": f"p {i}", "response": "yes", "reward": i} for i in range(8)])
    return folder


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def scoring(home: Path, out: Path, *more: object, objective: str = "preferences") -> list[str]:
    """The arguments of ``score`` on the files of ``home``."""
    source = home / f"{objective}.jsonl"
    basic = ["score", "--model", home / "model", "--negatives", home / "negatives.jsonl", f"--{objective}", source]
    return [str(a) for a in (*basic, "--out", out, "--window", 8, *more)]


def error_line(result) -> str:
    """The one line on stderr that ends a user's mistake."""
    assert "Traceback" not in result.output
    return result.stderr.strip().splitlines()[-1]


def test_version_and_help():
    assert run("--version").stdout.startswith("u2a-fast ")
    for verb in ("score", "doctor"):
        assert verb in run("--help").stdout
    assert "--objective-reduction" in run("score", "--help").stdout, "names are shown whole"


def test_score_writes_everything(home, tmp_path):
    result = run(*scoring(home, tmp_path / "out", "--json"))
    summary = json.loads(result.stdout)
    assert (summary["rows"], summary["nonfinite"], summary["skipped"]) == (40, 0, 0)
    assert summary["signal"] == json.loads((tmp_path / "out" / "signal.json").read_text())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "run.yaml", "scores.parquet", "signal.json", "skipped.jsonl"
    ]  # fmt: skip
    assert read_scores(tmp_path / "out")["id"].tolist() == [f"n{i}" for i in range(40)]
    record = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert record["command"] == "score" and record["finished"] >= record["started"]
    assert record["options"]["objective"] == "dpo" and record["options"]["max_length"] == 128
    assert record["versions"]["torch"] == torch.__version__
    assert str(home / "negatives.jsonl") in record["inputs_sha256"]
    assert str(home / "model" / "model.safetensors") in record["inputs_sha256"]


def test_score_in_an_approximate_mode_says_so(home, tmp_path):
    options = ("--no-signal-check", "--json", "--mode", "lowrank", "--rank", 2)
    printed = json.loads(run(*scoring(home, tmp_path / "out", *options)).stdout)
    assert printed["scoring"]["mode"] == "lowrank" and 0 < printed["scoring"]["energy"] < 1
    assert not read_scores(tmp_path / "out")["exact"].any()
    outcome = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["result"]
    assert outcome["scoring"] == printed["scoring"] and outcome["energy_by_parameter"]
    layers = ("--no-signal-check", "--mode", "layers", "--fraction", 0.5)
    assert "scoring share: " in run(*scoring(home, tmp_path / "layers", *layers)).stdout


def test_score_agrees_with_the_python_api(home, tmp_path):
    from u2a_fast import DPO, InfluenceScorer
    from u2a_fast.data import read_negatives, read_preferences

    run(*scoring(home, tmp_path / "out", "--window", 64, "--parameters", "linear,norm", "--curvature", "fisher"))
    model, tokenizer = load_model(home / "model")
    pairs = read_preferences(home / "preferences.jsonl", tokenizer)
    scorer = InfluenceScorer(model, tokenizer, DPO(pairs), "fisher", parameters=["linear", "norm"])
    expected = scorer.score(read_negatives(home / "negatives.jsonl", tokenizer))
    assert read_scores(tmp_path / "out")["score"].tolist() == expected.score.tolist()


def test_batch_invariant_scores_do_not_depend_on_windows_and_budgets(home, tmp_path):
    options = ["--batch-invariant", "--no-signal-check"]
    run(*scoring(home, tmp_path / "first", *options))
    run(*scoring(home, tmp_path / "second", *options, "--window", 17, "--token-budget", 50))
    first, second = (read_scores(tmp_path / name) for name in ("first", "second"))
    assert first["score"].tolist() == second["score"].tolist()
    assert yaml.safe_load((tmp_path / "first" / "run.yaml").read_text())["options"]["batch_invariant"] is True


@pytest.mark.parametrize("objective", ["rewards", "positives"])
def test_other_objectives_follow_from_their_data(home, tmp_path, objective):
    run(*scoring(home, tmp_path / "out", objective=objective))
    options = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["options"]
    assert (options["objective"], options["objective_reduction"]) == (
        {"rewards": "reward", "positives": "sft"}[objective],
        "mean",
    )


def test_run_yaml_replays_and_the_line_wins(home, tmp_path):
    run(*scoring(home, tmp_path / "first", "--loss", "npo", "--seed", 3))
    replay = ["score", "--config", tmp_path / "first" / "run.yaml"]
    assert "pass --overwrite" in error_line(run(*replay, code=2))
    run(*replay, "--out", tmp_path / "second")
    first, second = (read_scores(tmp_path / name) for name in ("first", "second"))
    assert first["score"].tolist() == second["score"].tolist()
    run(*replay, "--out", tmp_path / "third", "--loss", "ga", "--no-signal-check")
    record = yaml.safe_load((tmp_path / "third" / "run.yaml").read_text())
    assert (record["options"]["loss"], record["options"]["seed"]) == ("ga", 3)


def test_config_is_checked(home, tmp_path):
    plain = tmp_path / "plain.yaml"
    plain.write_text(yaml.safe_dump({"model": str(home / "model"), "token-budgte": 3}))
    assert "token_budgte" in error_line(run("score", "--config", plain, code=2))
    plain.write_text("command: select\noptions: {}\n")
    assert "is a run of 'select'" in error_line(run("score", "--config", plain, code=2))
    plain.write_text("a: [1\n")
    assert "no valid YAML" in error_line(run("score", "--config", plain, code=2))
    assert "no such file" in error_line(run("score", "--config", tmp_path / "absent.yaml", code=2))


def test_existing_results_are_refused_before_any_work(home, tmp_path):
    run(*scoring(home, tmp_path / "out"))
    before = (tmp_path / "out" / "scores.parquet").stat().st_mtime_ns
    broken = ["score", "--model", tmp_path / "nowhere", "--negatives", "n.jsonl", "--out", tmp_path / "out"]
    assert "scores.parquet: pass --overwrite" in error_line(run(*broken, code=2))
    run(*scoring(home, tmp_path / "out", "--overwrite"))
    assert (tmp_path / "out" / "scores.parquet").stat().st_mtime_ns > before
    (tmp_path / "file").touch()
    assert "expected a folder, got the file" in error_line(run(*scoring(home, tmp_path / "file"), code=2))


def test_wrong_inputs_end_in_one_line(home, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    shutil.copytree(home / "model", tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    for options, words in [
        (["--model", tmp_path / "absent"], "no such folder"),
        (["--model", tmp_path / "folder"], "without config.json"),
        (["--model", home / "negatives.jsonl"], "got the file"),
        (["--model", tmp_path / "mute"], "no tokenizer found"),
        (["--adapter", tmp_path / "folder"], "without adapter_config.json"),
        (["--negatives", tmp_path / "absent.jsonl"], "no such file or folder"),
        (["--negatives", tmp_path / "folder"], "save_to_disk"),
        (["--negatives", tmp_path / "empty.jsonl"], "got the empty source"),
        (["--preferences", home / "negatives.jsonl"], "none fits"),
        (["--objective", "sft"], "expected --positives for the objective sft"),
        (["--rewards", home / "rewards.jsonl"], "got --preferences, --rewards"),
        (["--columns", "prompt"], "expected field=column, got 'prompt'"),
        (["--parameters", "lora"], "matches no parameter"),
        (["--parameters", "weights"], "or kinds out of"),
        (["--device", "cuda:99"], "CUDA devices, got 'cuda:99'"),
        (["--device", "abacus"], 'expected device such as "cpu"'),
        (["--max-length", 3], "does not fit in max_length 3"),
        (["--split", "train"], "only datasets have splits"),
    ]:
        result = run(*scoring(home, tmp_path / "out", *options), code=2)
        assert words in result.stderr and "Traceback" not in result.output, (options, result.stderr)
        assert not (tmp_path / "out").exists(), options
    assert isinstance(run(*scoring(home, tmp_path / "out", "--split", "x", "--debug"), code=1).exception, ValueError)


def test_bad_rows_by_policy(home, tmp_path):
    lines = (home / "negatives.jsonl").read_text().splitlines()
    lines[3:3] = ["{broken", json.dumps({"id": "x", "prompt": "q", "response": ""})]
    negatives = tmp_path / "negatives.jsonl"
    negatives.write_text("\n".join(lines))
    result = run(*scoring(home, tmp_path / "out", "--negatives", negatives), code=2)
    assert f"{negatives}:4: invalid JSON" in result.stderr and f"{negatives}:5: response is empty" in result.stderr
    assert not (tmp_path / "out").exists()
    result = run(*scoring(home, tmp_path / "out", "--negatives", negatives, "--on-bad-row", "skip", "--json"))
    assert json.loads(result.stdout)["skipped"] == 2
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in skipped] == [(str(negatives), 4), (str(negatives), 5)]
    run(*scoring(home, tmp_path / "whole"))
    whole, partial = (read_scores(tmp_path / name)["id"].tolist() for name in ("whole", "out"))
    assert whole == partial


def test_nonfinite_scores_are_kept_counted_and_reported(home, tmp_path):
    """One byte, which a single negative holds, has an embedding of NaN; its neighbors in the batch stay finite."""
    shutil.copytree(home / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    from transformers import AutoTokenizer

    token = AutoTokenizer.from_pretrained(home / "model").convert_tokens_to_ids("~")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    rows = [{"id": str(i), "prompt": "q", "response": "~" if i == 5 else "no"} for i in range(9)]
    negatives = write_rows(tmp_path / "n.jsonl", rows)
    options = ["--model", tmp_path / "model", "--negatives", negatives, "--no-signal-check", "--json"]
    result = run(*scoring(home, tmp_path / "out", *options))
    assert json.loads(result.stdout)["nonfinite"] == 1
    assert "1 scores are NaN or infinite and stay so: 5" in result.stderr
    finite = [bool(torch.tensor(s).isfinite()) for s in read_scores(tmp_path / "out")["score"]]
    assert finite == [i != 5 for i in range(9)]


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_pad_token_does_not_matter(home, tmp_path, pad):
    save_tiny_model(tmp_path / "model", pad=pad)
    run(*scoring(home, tmp_path / "out", "--model", tmp_path / "model"))
    run(*scoring(home, tmp_path / "usual"))
    assert read_scores(tmp_path / "out")["score"].tolist() == read_scores(tmp_path / "usual")["score"].tolist()


def test_adapter_folder_is_loaded_and_scored(home, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    peft_model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    peft_model.peft_config["default"].base_model_name_or_path = str(home / "model")
    peft_model.save_pretrained(tmp_path / "adapter")
    run(*scoring(home, tmp_path / "on_top", "--adapter", tmp_path / "adapter"))
    run(*scoring(home, tmp_path / "alone", "--model", tmp_path / "adapter", "--parameters", "lora"))
    first, second = (read_scores(tmp_path / name)["score"].tolist() for name in ("on_top", "alone"))
    assert first == second


def start(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*RUN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # a job that a shell put in the background ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def long_run(home, tmp_path_factory) -> tuple[list[str], Path]:
    """Options that make ``score`` take a hundred windows, and the result of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("long")
    rows = [{"id": f"n{i}", "prompt": f"q {i}", "response": f"no {i}" * (1 + i % 3)} for i in range(200)]
    more = ["--negatives", str(write_rows(folder / "n.jsonl", rows)), "--curvature", "fisher", "--window", "2"]
    run(*scoring(home, folder / "whole", *more))
    return more, folder / "whole"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_scoring_resumes_to_the_same_bytes(home, long_run, tmp_path, how):
    more, whole = long_run
    arguments = scoring(home, tmp_path / "out", *more)
    process = start(arguments)
    wait_for(tmp_path / "out" / "parts" / "part-000003.parquet", process)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted: run the same command again" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "out" / "scores.parquet").exists()
    other = run(*arguments, "--loss", "npo", code=2)
    assert "made with other settings (options.loss: 'ga' then, 'npo' now)" in error_line(other)
    resumed = json.loads(run(*arguments, "--json").stdout)
    assert 8 <= resumed["resumed_rows"] < 200
    assert (tmp_path / "out" / "scores.parquet").read_bytes() == (whole / "scores.parquet").read_bytes()


def stop_at_the_end(monkeypatch, after: bool) -> None:
    """Ctrl-C in the moment in which a run records its end: before run.yaml is written, or after it."""
    finish = RunRecord.finish

    def stopped(record: RunRecord, result) -> None:
        if after:
            finish(record, result)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunRecord, "finish", stopped)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("verb", ["score", "select", "evaluate"])
def test_a_run_stopped_while_it_ends_is_finished_by_the_next(home, scored, tmp_path, monkeypatch, verb, after):
    """What says that all is done comes last, so that the same command is not told that it is done."""
    out = tmp_path / "out"
    arguments, file = {
        "score": (scoring(home, out), "scores.parquet"),
        "select": (["select", "--scores", scored, "--k", 5, "--out", out], "selection.parquet"),
        "evaluate": (
            ["evaluate", "--model", home / "model", "--preferences", home / "preferences.jsonl", "--out", out],
            "metrics.json",
        ),
    }[verb]
    with monkeypatch.context() as patched:
        stop_at_the_end(patched, after)
        assert "interrupted:" in run(*arguments, code=130).stderr
    assert not (out / file).exists()
    made = json.loads(run(*arguments, "--json").stdout)
    assert made.get("resumed_rows", 40) == 40 and (out / file).exists()
    assert {path.name for path in out.iterdir()} <= {file, "run.yaml", "signal.json", "skipped.jsonl"}
    assert yaml.safe_load((out / "run.yaml").read_text())["finished"]
    if verb == "score":
        assert (out / file).read_bytes() == (scored / file).read_bytes()


def test_a_damaged_signal_of_a_resumed_run_is_named(home, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_at_the_end(patched, after=False)
        run(*scoring(home, out), code=130)
    (out / "signal.json").write_text("{half")
    assert f"expected JSON, got {out / 'signal.json'}" in error_line(run(*scoring(home, out), code=2))


def test_what_is_refused_overwrites_nothing(home, tmp_path):
    out = tmp_path / "out"
    run(*scoring(home, out))
    before = {path: path.read_bytes() for path in out.iterdir()}
    few = write_rows(tmp_path / "p.jsonl", [{"prompt": "p", "chosen": "yes", "rejected": "no"}])
    for options, words in [
        (["--curvature", "fisher", "--damping", 0], "expected a finite damping > 0, got 0.0"),
        (["--preferences", few], "expected at least 4 preference rows, got 1 (--no-signal-check goes on without it)"),
    ]:
        assert words in error_line(run(*scoring(home, out, "--overwrite", *options), code=2))
        assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert "at least 4 preference rows" in error_line(
        run(*aligning(home, tmp_path / "a", "--preferences", few), code=2)
    )
    assert not (tmp_path / "a").exists()


def test_an_empty_out_is_no_folder(home, scored, tmp_path, monkeypatch):
    """It is what a shell makes of a variable that is not set; as a path it would be the current folder."""
    monkeypatch.chdir(tmp_path)
    for arguments in (scoring(home, Path("x")), aligning(home, Path("x")), ["select", "--scores", scored, "--k", 2]):
        result = run(*[a for a in arguments if a not in ("--out", "x")], "--out", "", code=2)
        assert "expected a folder, got an empty text" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_doctor(home):
    result = run("doctor", "--json")
    report = json.loads(result.stdout)
    assert report["healthy"] is True
    names = [finding["name"] for finding in report["findings"]]
    assert {"torch", "C++ kernels", "Triton", "ghost_dot on cpu"} <= set(names)
    assert "ghost_dot on cpu" in run("doctor").stdout


def test_doctor_finds_a_wrong_op(monkeypatch):
    from u2a_fast import ops

    right = ops.ghost_norm
    monkeypatch.setattr(ops, "ghost_norm", lambda *a, **k: right(*a, **k) * 1.01)
    report = json.loads(run("doctor", "--json", code=1).stdout)
    assert [f["name"] for f in report["findings"] if f["status"] == "fail"] == ["ghost_norm on cpu"]


@pytest.fixture(scope="module")
def scored(home, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "out"
    run(*scoring(home, out))
    return out


def test_select(scored, tmp_path):
    result = run("select", "--scores", scored, "--out", tmp_path / "s", "--k", 5, "--weights", "eg", "--json")
    summary = json.loads(result.stdout)
    selection = read_selection(tmp_path / "s")
    scores = read_scores(scored)
    best = sorted(zip(-scores["score"], scores["id"], strict=True))[:5]
    assert selection["id"].tolist() == [name for _, name in best]
    assert selection["weight"].mean() == pytest.approx(1, rel=1e-12)
    assert (summary["selected"], summary["of"]) == (5, 40) and 2.5 <= summary["effective_sample_size"] <= 5
    record = yaml.safe_load((tmp_path / "s" / "run.yaml").read_text())
    assert list(record["inputs_sha256"]) == [str(scored / "scores.parquet")]
    run("select", "--config", tmp_path / "s" / "run.yaml", "--out", tmp_path / "t", "--k", 3)
    assert len(read_selection(tmp_path / "t")["id"]) == 3


def test_select_refusals(scored, tmp_path):
    for options, words in [
        (["--strategy", "top-k"], "expected k >= 1"),
        (["--scores", tmp_path / "absent", "--k", 1], "no such file"),
        (["--strategy", "threshold", "--threshold", 1e9], "none of 40 negatives qualifies"),
    ]:
        result = run("select", "--scores", scored, "--out", tmp_path / "s", *options, code=2)
        assert words in error_line(result)
        assert not (tmp_path / "s").exists()
    run("select", "--scores", scored, "--out", tmp_path / "s", "--k", 2)
    assert "pass --overwrite" in error_line(
        run("select", "--scores", scored, "--out", tmp_path / "s", "--k", 2, code=2)
    )


def test_evaluate(home, tmp_path):
    sets = [f"--{name}={home / f'{name}.jsonl'}" for name in ("preferences", "negatives", "positives")]
    result = run(
        "evaluate", "--model", home / "model", "--reference", home / "model", *sets, "--out", tmp_path / "e", "--json"
    )
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert json.loads(result.stdout) == metrics
    assert metrics["preference"]["loss"] == pytest.approx(0.6931471805599453, rel=1e-6), "log 2 against itself"
    assert metrics["forgetting"]["nll_rise"] == 0 and metrics["utility"]["rows"] == 8
    nothing = run("evaluate", "--model", home / "model", "--out", tmp_path / "f", code=2)
    assert "expected --preferences, --negatives or --positives" in error_line(nothing)


@pytest.fixture(scope="module")
def selected(scored, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("selected") / "out"
    run("select", "--scores", scored, "--out", out, "--k", 6, "--weights", "eg")
    return out


def unlearning(home: Path, out: Path, *more: object) -> list[str]:
    """The arguments of ``unlearn`` on the files of ``home``."""
    basic = ["unlearn", "--model", home / "model", "--negatives", home / "negatives.jsonl", "--out", out]
    return [str(a) for a in (*basic, "--lr", 1e-2, "--batch-size", 3, *more)]


def test_unlearn(home, selected, tmp_path):
    result = run(*unlearning(home, tmp_path / "u", "--selection", selected, "--json"))
    summary = json.loads(result.stdout)
    assert summary["steps"] == 2 and summary["drift"] > 0
    model, tokenizer = load_model(tmp_path / "u" / "model")
    assert tokenizer.eos_token == "<eos>" and not torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)
    record = yaml.safe_load((tmp_path / "u" / "run.yaml").read_text())
    assert str(selected / "selection.parquet") in record["inputs_sha256"]
    assert "pass --overwrite" in error_line(run(*unlearning(home, tmp_path / "u"), code=2))
    run("unlearn", "--config", tmp_path / "u" / "run.yaml", "--out", tmp_path / "v")
    again, _ = load_model(tmp_path / "v" / "model")
    assert torch.equal(model.lm_head.weight, again.lm_head.weight), "a replay gives the same model"


def test_unlearn_trains_the_selected_parameters_alone(home, tmp_path):
    run(
        *unlearning(
            home, tmp_path / "u", "--parameters", "norm", "--max-steps", 2, "--retain", home / "positives.jsonl"
        )
    )
    before, after = tiny_model().state_dict(), load_model(tmp_path / "u" / "model")[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "norm" in name}


def test_unlearn_refusals(home, selected, tmp_path):
    fewer = write_rows(tmp_path / "n.jsonl", [{"id": "n0", "prompt": "q", "response": "no"}])
    for options, words in [
        (["--selection", selected, "--negatives", fewer], "among the negatives"),
        (["--selection", tmp_path / "absent"], "no such file"),
        (["--loss", "graddiff"], "expected retain examples"),
        (["--micro-batch-size", 2], "micro_batch_size dividing batch_size"),
        (["--lr", 0], "learning_rate > 0"),
    ]:
        result = run(*unlearning(home, tmp_path / "u", *options), code=2)
        assert words in error_line(result)
        assert not (tmp_path / "u" / "model").exists()


def aligning(home: Path, out: Path, *more: object) -> list[str]:
    """The arguments of ``align`` on the files of ``home``."""
    data = ["--negatives", home / "negatives.jsonl", "--preferences", home / "preferences.jsonl"]
    steps = ["--rounds", 2, "--patience", 2, "--k", 6, "--lr", 1e-3, "--batch-size", 3, "--max-drift", 0]
    return [str(a) for a in ("align", "--model", home / "model", *data, "--out", out, *steps, *more)]


def test_align(home, tmp_path):
    summary = json.loads(run(*aligning(home, tmp_path / "a", "--json")).stdout)
    rounds = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert summary["rounds"] == len(rounds) == 2 and len(summary["heldout_loss"]) == 2
    for number in range(2):
        names = {path.name for path in (tmp_path / "a" / f"round-{number:02d}").iterdir()}
        assert {"scores.parquet", "selection.parquet", "metrics.json"} <= names
    assert (tmp_path / "a" / "signal.json").exists() and (tmp_path / "a" / "model" / "model.safetensors").exists()
    assert "pass --overwrite" in error_line(run(*aligning(home, tmp_path / "a"), code=2))
    assert json.loads(run(*aligning(home, tmp_path / "a", "--overwrite", "--json")).stdout) == summary


def test_align_says_how_16_bit_ranks_compare(home, tmp_path):
    text = run(*aligning(home, tmp_path / "a", "--dtype", "bfloat16", "--rounds", 1, "--no-signal-check")).stdout
    found = json.loads((tmp_path / "a" / "metrics.json").read_text())[0]["float32_spearman"]
    assert f"float32 spearman: {found:.6g}\n" in text and 0 < found <= 1


def test_killed_alignment_resumes_to_the_same_model(home, tmp_path):
    run(*aligning(home, tmp_path / "whole", "--epochs", 15))
    arguments = aligning(home, tmp_path / "killed", "--epochs", 15)
    process = start(arguments)
    wait_for(tmp_path / "killed" / "round-00" / "metrics.json", process)
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "killed" / "model").exists()
    assert "holds a run of another config" in error_line(run(*arguments, "--lr", 1e-4, code=2))
    run(*arguments)
    models = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_report(scored, tmp_path):
    summary = json.loads(run("report", "--run", scored, "--out", tmp_path / "page.html", "--json").stdout)
    assert Path(summary["report"]).read_text().lstrip().lower().startswith("<!doctype html")
    again = run("report", "--run", scored, "--out", tmp_path / "page.html", code=2)
    assert "page.html exists: pass --overwrite" in error_line(again)
    assert "Traceback" not in run("report", "--run", tmp_path / "absent", code=2).output


def test_demo_hands_over_its_options_and_its_result(monkeypatch, tmp_path):
    """The demo itself is tested in test_demo.py."""
    calls = []

    def run_demo(out, **options):
        calls.append((out, options))
        return {"claims": [], "all_hold": True, "spearman": 0.5, "summary": {}, "seconds": 1.0, "report": "page"}

    monkeypatch.setattr("u2a_fast.cli.show.run_demo", run_demo)
    result = run("demo", "--out", tmp_path, "--fast", "--seeds", 3, "--seeds", 4, "--device", "cpu", "--json")
    assert calls == [(tmp_path, {"seed": 0, "seeds": [3, 4], "fast": True, "device": torch.device("cpu")})]
    assert json.loads(result.stdout)["all_hold"] is True
    (tmp_path / "demo.json").touch()
    assert "pass --overwrite" in error_line(run("demo", "--out", tmp_path, code=2))


def test_every_verb_is_documented():
    page = (Path(__file__).resolve().parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    verbs = [str(command.callback.__name__) for command in app.registered_commands if command.callback is not None]
    verbs += [str(group.typer_instance.info.name) for group in app.registered_groups if group.typer_instance]
    assert [line.split()[1] for line in page.split("```")[1].splitlines() if line.startswith("u2a-fast ")] == verbs


def test_a_folder_of_another_verb_is_refused(scored, tmp_path):
    shutil.copytree(scored, tmp_path / "s")
    before = (tmp_path / "s" / "run.yaml").read_bytes()
    same = ("select", "--scores", tmp_path / "s", "--k", 2, "--out", tmp_path / "s")
    assert "holds a run of 'score'" in error_line(run(*same, code=2))
    assert (tmp_path / "s" / "run.yaml").read_bytes() == before


@pytest.mark.parametrize("verb", ["unlearn", "align"])
def test_the_model_given_is_never_replaced(home, tmp_path, verb):
    shutil.copytree(home / "model", tmp_path / "model")
    arguments = (unlearning if verb == "unlearn" else aligning)(home, tmp_path, "--model", tmp_path / "model")
    assert (tmp_path / "model").is_dir() and run(*arguments, code=2)
    assert "would replace --model" in error_line(run(*arguments, "--overwrite", code=2))
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (home / "model/model.safetensors").read_bytes()


def test_a_model_of_somebody_else_is_not_replaced(home, tmp_path):
    (tmp_path / "model").mkdir()
    assert "holds model: pass --overwrite" in error_line(run(*unlearning(home, tmp_path), code=2))
    run(*unlearning(home, tmp_path, "--max-steps", 1, "--overwrite"))
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_two_runs_do_not_share_a_folder(home, scored, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    unlock = lock_folder(out)
    for arguments in (scoring(home, out), unlearning(home, out), aligning(home, out)):
        assert "another run is writing into" in error_line(run(*arguments, code=2))
        assert not list(out.iterdir())
    unlock()
    run("select", "--scores", scored, "--k", 2, "--out", out)
    run("select", "--scores", scored, "--k", 3, "--out", out, "--overwrite")


def test_broken_models_end_in_one_line(home, tmp_path):
    def damaged(name: str) -> Path:
        return shutil.copytree(home / "model", tmp_path / name)

    weights = load_file(home / "model" / "model.safetensors")
    cut = damaged("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:5000])
    save_file({k: v for k, v in weights.items() if "layers.1" not in k}, damaged("lacking") / "model.safetensors")
    config = json.loads((home / "model" / "config.json").read_text())
    (damaged("shape") / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    (damaged("typeless") / "config.json").write_text("{}")
    few = {name: v[:64] if v.shape[0] == config["vocab_size"] else v for name, v in weights.items()}
    save_file(few, damaged("few") / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "few" / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    for name, words in [
        ("cut", "cannot be loaded as a causal LM"),
        ("lacking", "lacks 9 weights of a LlamaForCausalLM: model.layers.1."),
        ("shape", "cannot be loaded as a causal LM"),
        ("typeless", "has no usable config.json"),
        ("few", "expected embeddings for the tokenizer's"),
    ]:
        assert words in error_line(run(*scoring(home, tmp_path / "out", "--model", tmp_path / name), code=2))


def test_a_full_disk_ends_in_one_line(home, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    assert "No space left on device" in error_line(run(*unlearning(home, tmp_path / "u"), code=2))
    assert not (tmp_path / "u" / "model").exists()


def test_odd_options_end_in_one_line(home, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("3: 4\n")
    assert "does not have: 3" in error_line(run("score", "--config", config, code=2))
    assert "a regular expression" in error_line(run(*scoring(home, tmp_path / "o", "--parameters", "re:["), code=2))
    for options, words in [(["--strategy", "budget"], "token_budget >= 1"), (["--cap", "nan"], "cap >= 1")]:
        assert words in error_line(run(*aligning(home, tmp_path / "a", *options), code=2))
    assert not (tmp_path / "a").exists(), "before any scoring"

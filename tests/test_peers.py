"""The peers' benchmark on a tiny model, with those of them that need no environment of their own; no times."""

import ast
import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

# benchmarks are no part of the installed package
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import __main__ as command
from benchmarks.peers import environments, measure, on_device, worker
from benchmarks.peers.adapters import plain, projected, u2a_fast
from benchmarks.peers.contestants import ADAPTERS, CONTESTANTS, Contestant, user_code_lines
from benchmarks.peers.task import Recipe, Task, batches, ordered
from benchmarks.peers.truth import AGREEMENT, HALF_AGREEMENT, judge, truths
from benchmarks.workloads import Workload, random_examples, random_llama

BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def original() -> Task:
    model = random_llama(hidden=32, layers=2, ffn=64, heads=2, kv_heads=1, vocabulary=64)
    examples = [random_examples(1, tokens=n, vocabulary=64, seed=n)[0] for n in (9, 16, 5, 12, 7, 16, 11, 6, 14, 8)]
    workload = Workload("tiny", model, examples, random_examples(3, tokens=10, vocabulary=64, seed=99))
    return Task(model, examples, workload.others, workload.direction())


@pytest.fixture
def task(original: Task) -> Task:
    return replace(original, model=copy.deepcopy(original.model))


@pytest.fixture(scope="module")
def truth(original: Task) -> dict[str, Tensor]:
    return truths(original)


EXACT = (
    "torch-jvp",
    "torch-vmap",
    "public",
    "public_padded",
    "hooks",
    "hooks-1",
    "u2a_fast-forward",
    "u2a_fast-reverse",
    "u2a_fast-ghost_norm",
)


@pytest.mark.parametrize("name", EXACT)
def test_exact_contestants_are_exact(name: str, task: Task, truth: dict[str, Tensor]) -> None:
    contestant = BY_NAME[name]
    adapter = {"plain": plain, "u2a_fast": u2a_fast}[contestant.adapter]
    judged = judge(contestant, getattr(adapter, contestant.mode)(task)(task.examples).tolist(), truth)
    assert judged["relative_error"] <= AGREEMENT
    assert judged["pearson"][contestant.truth] == pytest.approx(1)


def test_projections_of_full_width_are_exact(task: Task, truth: dict[str, Tensor]) -> None:
    # 64 coordinates are all that a layer of this model has, so that without a sketch nothing is lost
    score = projected._projected(task, projected._coordinates, lambda size: lambda flat: flat)
    torch.testing.assert_close(score(task.examples), truth["linears"], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("mode", "size", "value"), [("logra", "RANK", 512), ("grass", "SKETCH", 4096)])
def test_projections_estimate(
    mode: str, size: str, value: int, task: Task, truth: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(projected, size, value)
    scores = getattr(projected, mode)(task)(task.examples)
    correlation = torch.corrcoef(torch.stack([scores, truth["linears"]]))[0, 1]
    assert 0.97 < correlation < 1 - 1e-6


def test_a_task_survives_its_folder(original: Task, tmp_path: Path) -> None:
    original.save(tmp_path)
    loaded = Task.load(tmp_path)
    assert (loaded.examples, loaded.others) == (original.examples, original.others)
    assert list(loaded.direction) == [name for name, _ in original.model.named_parameters()]
    assert all(torch.equal(v, original.direction[name]) for name, v in loaded.direction.items())
    assert all(torch.equal(p, q) for p, q in zip(loaded.model.parameters(), original.model.parameters(), strict=True))


def test_batches_are_sorted_and_scores_are_not(original: Task) -> None:
    shapes = [batch.input_ids.shape for batch in batches(original.examples, 4)]
    assert shapes == [(4, 17), (4, 12), (2, 7)]
    found = ordered(original, original.examples, lambda ids, labels: (labels != -100).sum(1), size=4)
    assert found.tolist() == [sum(label != -100 for label in example["labels"]) for example in original.examples]


def test_rounds_give_rows(original: Task, tmp_path: Path) -> None:
    broken = Contestant("broken", "broken", "plain", "missing")
    chosen = [BY_NAME[name] for name in ("forward", "u2a_fast-reverse")]
    settings = measure.Settings(tmp_path, rounds=2, timed=8, threads=1, patience=120)
    rows = {row["case"]: row for row in measure.measure("tiny", original, [*chosen, broken], settings)}
    assert "has no attribute 'missing'" in rows["tiny-broken"]["error"]
    assert rows["tiny-forward"]["units"] == [1, 1, 1]
    row = rows["tiny-u2a_fast-reverse"]
    assert row["error"] is None and row["relative_error"] <= AGREEMENT
    assert (row["judged_examples"], row["examples"], row["rounds"]) == (10, 8, 2)
    assert 0 < row["units"][0] <= row["units"][2] and row["lines"] > 0
    assert row["peak_mib"] is None or row["peak_mib"] > row["rise_mib"] >= 0
    json.dumps(list(rows.values()), allow_nan=False)


def test_wrong_scores_are_no_result(truth: dict[str, Tensor]) -> None:
    wrong = {name: (values * 1.001).tolist() for name, values in truth.items()}
    entry = measure.Entry(BY_NAME["torch-jvp"], 10, 10)
    measure.judge_entry(entry, wrong["all"], truth)
    assert entry.error is not None and "differ from float64 autograd (all)" in entry.error
    with pytest.raises(measure.GateError, match="u2a_fast-reverse"):
        measure.judge_entry(measure.Entry(BY_NAME["u2a_fast-reverse"], 10, 10), wrong["all"], truth)
    entry = measure.Entry(BY_NAME["u2a_fast-reverse_bf16"], 10, 10)
    measure.judge_entry(entry, truth["all"].flip(0).tolist(), truth)
    assert entry.error is not None and "below 0.995" in entry.error


def test_every_contestant_has_its_function_and_environment() -> None:
    for contestant in CONTESTANTS:
        assert not contestant.environment or contestant.environment in environments.PACKAGES
        if contestant.adapter:
            tree = ast.parse((ADAPTERS / f"{contestant.adapter}.py").read_text(encoding="utf-8"))
            defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assigned = {
                n.id
                for node in tree.body
                if isinstance(node, ast.Assign)
                for n in ast.walk(node.targets[0])
                if isinstance(n, ast.Name)
            }
            assert contestant.mode in defined | assigned
            assert user_code_lines(contestant) > 0


def test_marks_in_adapters_are_paired() -> None:
    for path in ADAPTERS.glob("*.py"):
        marks = re.findall(r"^\s*# (user code|end)\b", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert marks == ["user code", "end"] * (len(marks) // 2), path.name


def test_environments_keep_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def make(home: Path, packages: tuple[str, ...], wheels: Path | None) -> environments.Environment:
        home.mkdir(parents=True, exist_ok=True)
        made.append(home)
        return environments.Environment("python", "it broke")

    monkeypatch.setattr(environments, "_make", make)
    first, second = (environments.prepare("sjlt", tmp_path) for _ in range(2))
    assert first == second and first.error == "it broke" and len(made) == 1
    assert environments.prepare("", tmp_path).python == sys.executable
    environments.prepare("sjlt", tmp_path, wheels=tmp_path)
    assert len(made) == 2, "what the network did not have, a folder of wheels may"


def test_wheels_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if "venv" in command:
            version = f"python{sys.version_info.major}.{sys.version_info.minor}"
            (tmp_path / "sjlt" / "lib" / version / "site-packages").mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(environments.subprocess, "run", run)
    assert environments._make(tmp_path / "sjlt", ("sjlt",), tmp_path / "wheels").error is None
    assert commands[1][-4:] == ["--no-index", "--find-links", str(tmp_path / "wheels"), "sjlt"]


CONFIG = on_device.LLAMA_19M | {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 64}
TINY = on_device.Sizes(CONFIG | {"num_attention_heads": 2, "num_key_value_heads": 1}, tokens=12, count=10, batch=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recipe_gives_the_same_task_everywhere(dtype: str, tmp_path: Path) -> None:
    task = on_device.make_task(TINY, "cpu", dtype)
    task.save(tmp_path)
    loaded = Task.load(tmp_path)
    assert loaded.recipe == Recipe(TINY.config, dtype, "cpu") and (loaded.device, loaded.batch) == ("cpu", 4)
    assert (loaded.examples, loaded.others) == (task.examples, task.others)
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert all(torch.equal(p, q) for p, q in zip(loaded.model.parameters(), task.model.parameters(), strict=True))
    assert all(torch.equal(v, task.direction[name]) for name, v in loaded.direction.items())
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors", ".safetensors"]


@pytest.mark.parametrize(
    "name", ["public", "hooks", "hooks-1", "torch-jvp", "torch-vmap", "u2a_fast-forward", "u2a_fast-lowrank", "grass"]
)
def test_contestants_run_in_half_precision(name: str) -> None:
    task, contestant = on_device.make_task(TINY, "cpu", "bfloat16"), BY_NAME[name]
    truth = truths(task, torch.float32)
    adapter = {"plain": plain, "u2a_fast": u2a_fast, "projected": projected}[contestant.adapter]
    judged = judge(contestant, getattr(adapter, contestant.mode)(task)(task.examples).tolist(), truth)
    assert judged["norm_error"] <= HALF_AGREEMENT if contestant.exact else judged["spearman"]["all"] > -1


def test_turns_on_a_device_give_rows(tmp_path: Path) -> None:
    task = on_device.make_task(TINY, "cpu", "bfloat16")
    broken = replace(BY_NAME["torch-jvp"], name="broken", mode="missing")
    chosen = [*on_device.entrants("bfloat16", []), broken]
    assert [c.name for c in chosen] == [*on_device.FIRST, "broken"]
    saved: list[list[dict[str, object]]] = []
    limits = on_device.Limits(rounds=2, patience=120)
    rows = on_device.measure_on_device(
        "tiny", task, chosen, limits, folder=tmp_path, reference=torch.float32, save=saved.append
    )
    assert saved[-1] == rows and len(saved) == 2, "nothing before all exact scores were right, then after everybody"
    unit, forward, reverse, failed = rows
    assert unit["case"] == "tiny-cpu-bfloat16-forward" and unit["units"] == [1, 1, 1] and unit["batch"] == 4
    assert "bfloat16 scores of u2a_fast within" in forward["gate"] and "of float32 autograd" in forward["gate"]
    assert forward["norm_error"] <= HALF_AGREEMENT and forward["batch"] is None and forward["rounds"] == 2
    assert reverse["examples"] == 10 and "has no attribute 'missing'" in failed["error"]
    json.dumps(rows, allow_nan=False)


def test_nothing_is_begun_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "_begun", lambda *_: iter(()))
    monkeypatch.setattr(on_device, "_warm", lambda *_: None)
    limits = on_device.Limits(until=0)
    with pytest.raises(measure.GateError, match="time was not enough"):
        task = on_device.make_task(TINY, "cpu")
        on_device.measure_on_device("tiny", task, on_device.entrants("float32", []), limits, folder=tmp_path)
    assert limits.answer() == 1


def test_the_command_takes_a_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[str, float]] = []

    def measured(name: str, task: Task, contestants: list[Contestant], limits: on_device.Limits, **_: object) -> None:
        calls.append((name, limits.left()))
        if name == "a":
            raise measure.GateError("wrong")

    monkeypatch.setattr(on_device, "WORKLOADS", {"a": TINY, "b": replace(TINY, dtype="bfloat16")})
    monkeypatch.setattr(on_device, "measure_on_device", measured)
    assert command.main(["--device", "cpu", "--seconds", "100"]) == 1
    assert [name for name, _ in calls] == ["a", "b"] and calls[0][1] <= 50 < calls[1][1] <= 100
    assert "GATE FAILED, nothing written: wrong" in capsys.readouterr().out


def test_batches_are_halved_until_they_fit(original: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(original, device="cuda", batch=8)
    tried: list[int] = []

    def run(score: object, examples: object, device: str) -> dict[str, object]:
        tried.append(task.batch)
        if task.batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {}

    monkeypatch.setattr(worker, "_run", run)
    assert worker._fitting_run(lambda examples: torch.zeros(1), task, 4) == {"batch": 2} and tried == [8, 4, 2]


def test_half_precision_binds_u2a_fast_alone(truth: dict[str, Tensor]) -> None:
    wrong = (truth["all"] * 1.1).tolist()
    entry = measure.Entry(BY_NAME["torch-jvp"], 10, 10)
    measure.judge_entry(entry, wrong, truth, half=True)
    assert entry.error is None and entry.judged["norm_error"] == pytest.approx(0.1)
    with pytest.raises(measure.GateError, match="of their norm"):
        measure.judge_entry(measure.Entry(BY_NAME["u2a_fast-reverse"], 10, 10), wrong, truth, half=True)


def test_errors_name_no_place() -> None:
    text = "warning\nERROR: no file '/some/where/x.py' at https://somewhere.org/simple/\nnote: see above\n"
    assert environments.public_error(text) == "ERROR: no file '...' at ..."
    assert environments.public_error("") == "no message"

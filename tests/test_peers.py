"""The peers' benchmark on a tiny model, with those of them that need no environment of their own; no times."""

import ast
import copy
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

# benchmarks are no part of the installed package
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import environments, measure
from benchmarks.peers.adapters import plain, projected, u2a_fast
from benchmarks.peers.contestants import ADAPTERS, CONTESTANTS, Contestant, user_code_lines
from benchmarks.peers.task import Task, batches, ordered
from benchmarks.peers.truth import AGREEMENT, judge, truths
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
    found = ordered(original.examples, lambda ids, labels: (labels != -100).sum(1), size=4)
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
    measure._judge(entry, wrong["all"], truth)
    assert entry.error is not None and "differ from float64 autograd (all)" in entry.error
    with pytest.raises(measure.GateError, match="u2a_fast-reverse"):
        measure._judge(measure.Entry(BY_NAME["u2a_fast-reverse"], 10, 10), wrong["all"], truth)
    entry = measure.Entry(BY_NAME["u2a_fast-reverse_bf16"], 10, 10)
    measure._judge(entry, truth["all"].flip(0).tolist(), truth)
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

    def make(home: Path, packages: tuple[str, ...]) -> environments.Environment:
        home.mkdir(parents=True)
        made.append(home)
        return environments.Environment("python", "it broke")

    monkeypatch.setattr(environments, "_make", make)
    first, second = (environments.prepare("sjlt", tmp_path) for _ in range(2))
    assert first == second and first.error == "it broke" and len(made) == 1
    assert environments.prepare("", tmp_path).python == sys.executable


def test_errors_name_no_place() -> None:
    text = "warning\nERROR: no file '/some/where/x.py' at https://somewhere.org/simple/\nnote: see above\n"
    assert environments.public_error(text) == "ERROR: no file '...' at ..."
    assert environments.public_error("") == "no message"

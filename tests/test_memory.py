"""Out of memory: it ends no run, changes no result, is said once, remembered, and found again by a resumed run.

A model that is out of memory above some number of tokens a batch stands for a device that is.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
import yaml
from test_cli import run, write_rows
from tiny_files import save_tiny_model

import u2a_fast
from u2a_fast import DPO, SFT, GradientIndex, InfluenceScorer
from u2a_fast.data.packing import batched, longest_examples
from u2a_fast.influence import modes
from u2a_fast.influence.ranks import RankPlan
from u2a_fast.models.decoder import Decoder
from u2a_fast.models.memory import OutOfRoom, Room, TokenBudget, is_out_of_memory
from u2a_fast.store import Journal, read_scores, read_selection, score_to_parquet
from u2a_fast.unlearning.measure import mean_of_fitting, nlls

ROOM, BUDGET = 60, 200


class Device:
    """Memory for ``room`` tokens a batch; counts what asked for more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: float = float("inf")
        self.failed: list[int] = []
        hidden = Decoder.hidden

        def within(decoder: Decoder, packed):
            if len(packed.input_ids) > self.room:
                self.failed.append(len(packed.input_ids))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return hidden(decoder, packed)

        monkeypatch.setattr(Decoder, "hidden", within)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def negatives(count: int = 30) -> list[dict[str, object]]:
    return [{"id": f"n{i}", **e} for i, e in enumerate(tiny.examples(count, 9))]


def scorer(**options) -> InfluenceScorer:
    objective = SFT([{"example": e} for e in tiny.examples(16, 5)])
    return InfluenceScorer(tiny.build("llama"), None, objective, **({"token_budget": BUDGET} | options))


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "[token_budget]" in str(w.message)]


def derivatives(mode: str) -> Callable[[int], torch.Tensor]:
    def run(budget: int) -> torch.Tensor:
        model = tiny.build("llama")
        return u2a_fast.directional_derivatives(
            model, negatives(), tiny.direction(model), mode=mode, rank=3, token_budget=budget
        )

    return run


def tokens(budget: int) -> torch.Tensor:
    model = tiny.build("llama")
    return torch.cat(u2a_fast.token_derivatives(model, negatives(), tiny.direction(model), token_budget=budget))


def modules(budget: int) -> torch.Tensor:
    model = tiny.build("llama")
    found = u2a_fast.module_derivatives(model, negatives(), tiny.direction(model), token_budget=budget)
    return torch.stack(list(found.values()))


def preferences() -> DPO:
    return DPO([{"chosen": a, "rejected": b} for a, b in zip(tiny.examples(8, 1), tiny.examples(8, 2), strict=True)])


def gradient(budget: int) -> torch.Tensor:
    model = tiny.build("llama")
    objective = preferences().prepare(model, token_budget=budget)
    return torch.cat([g.flatten() for g in objective.gradient(model, token_budget=budget).values()])


def logprobs(budget: int) -> torch.Tensor:
    return preferences().logprobs(tiny.build("llama"), token_budget=budget)


def measured(budget: int) -> torch.Tensor:
    return nlls(tiny.build("llama"), negatives(), reduction="mean", token_budget=TokenBudget(budget))


def scored(mode: str) -> Callable[[int], torch.Tensor]:
    def run(budget: int) -> torch.Tensor:
        return torch.from_numpy(scorer(mode=mode, rank=3, token_budget=budget).score(negatives()).score)

    return run


def ranked(budget: int) -> torch.Tensor:
    """A certified top k whose ranks are planned on profiles of a sample."""
    return torch.from_numpy(scorer(token_budget=budget).topk(negatives(260), 9).score)


LOOPS = {
    **{f"derivatives, {mode}": derivatives(mode) for mode in ("forward", "reverse", "lowrank")},
    **{f"scores, {mode}": scored(mode) for mode in ("auto", "reverse", "lowrank", "shortlist", "layers")},
    "tokens": tokens,
    "modules": modules,
    "gradient": gradient,
    "log-probabilities": logprobs,
    "measured NLLs": measured,
    "top k": ranked,
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=list(LOOPS))
def test_every_loop_halves_its_budget_and_gives_what_it_gave(loop: Callable[[int], torch.Tensor], device: Device):
    want, half = loop(BUDGET), loop(BUDGET // 4)
    device.room = ROOM
    with pytest.warns(UserWarning, match=r"batches of 200 tokens do not fit in memory: going on with 50 tokens"):
        got = loop(BUDGET)
    assert device.failed, "the device was never full"
    scale = want.abs().max()
    assert got.isfinite().all() and (got - want).abs().max() <= 1e-8 * scale
    # nothing of the batches that ran before the one that failed is left
    assert torch.equal(got, half)


def test_rank_profiles_halve_too(device: Device, monkeypatch: pytest.MonkeyPatch):
    shown = []
    monkeypatch.setattr(modes, "plan_ranks", lambda found, *_: shown.append(found) or RankPlan({}, 3.5, 1.0))
    for room in (float("inf"), ROOM):
        device.room = room
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = scorer().topk(negatives(260), 9)
        assert any("rank profiles: batches of 200" in text for text in said(caught)) == (room == ROOM)
    for name, profile in shown[0].items():
        np.testing.assert_allclose(shown[1][name].bounds, profile.bounds, rtol=1e-8)
    assert made.report.token_budget["rank profiles"] == 50


def test_an_index_halves_remembers_and_resumes_to_the_same_bytes(tmp_path: Path, device: Device):
    model, batch = tiny.build("llama").float(), negatives()
    options = {"dim": 64, "shard_rows": 10, "token_budget": BUDGET}
    want = np.concatenate(list(GradientIndex.build(model, batch, tmp_path / "whole", **options).shards.shards()))
    device.room = ROOM
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        index = GradientIndex.build(model, batch, tmp_path / "part", **options)
    assert len(said(caught)) == 1 and len(device.failed) == 2, "200 and 100 tokens are tried once"
    got = np.concatenate(list(index.shards.shards()))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    (tmp_path / "part" / "shard-000001.npy").unlink()
    device.failed.clear()
    again = GradientIndex.build(model, batch, tmp_path / "part", **options)
    assert np.concatenate(list(again.shards.shards())).tobytes() == got.tobytes() and not device.failed
    with pytest.warns(UserWarning, match="even alone .example 0, 90 tokens"):
        rows = GradientIndex.build(
            model, [{"input_ids": [5] * 90, "labels": [5] * 90}, *batch], tmp_path / "long", **options
        )
    assert rows.shards.nonfinite_rows() == 1


def test_batch_invariant_scores_keep_their_bits(device: Device):
    want = scorer(batch_invariant=True).score(negatives()).score
    device.room = max(len(e["input_ids"]) for e in [*negatives(), *tiny.examples(16, 5)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scorer(batch_invariant=True).score(negatives()).score.tobytes() == want.tobytes()


def test_windows_find_the_budget_before_the_first_and_say_it_once(tmp_path: Path, device: Device):
    rows = sorted(negatives(40), key=lambda e: len(e["input_ids"]))  # the longest come last
    want = read_scores(score_to_parquet(scorer(), rows, tmp_path / "free", window=10).path)["score"]
    device.room, s = ROOM, scorer()
    s.direction()
    tries: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        summary = score_to_parquet(
            s, rows, tmp_path / "full", window=10, on_progress=lambda *_: tries.append(len(device.failed))
        )
    assert len(said(caught)) == 1 and tries[1:] == [tries[1]] * 4, "no later window meets a full device"
    assert summary.token_budget == s.score(rows).report.token_budget
    assert summary.token_budget["forward pass"] == summary.token_budget["gradient"] == 50 == s.token_budget
    got = read_scores(summary.path)
    assert got["fits"].all() and np.abs(got["score"] - want).max() <= 1e-8 * np.abs(want).max()
    calls = len(device.failed)
    s.reset()
    s.score(rows[::-1])
    assert len(device.failed) == calls, "the scorer keeps what it found"


class Stop(BaseException):
    pass


def test_windows_resume_after_a_halving_to_the_same_bytes(tmp_path: Path, device: Device):
    rows, device.room = negatives(40), ROOM
    with pytest.warns(UserWarning, match="going on with 50"):
        whole = score_to_parquet(scorer(), rows, tmp_path / "whole", window=10)

    def stop(done: int, _: int | None) -> None:
        if done == 20:
            raise Stop

    with pytest.warns(UserWarning, match="going on with 50"), pytest.raises(Stop):
        score_to_parquet(scorer(), rows, tmp_path / "part", window=10, on_progress=stop)
    kept = json.loads((tmp_path / "part" / "parts" / "budget.json").read_text())
    assert kept == whole.token_budget
    device.room = float("inf")  # memory that is free again changes nothing
    resumed = score_to_parquet(scorer(), rows, tmp_path / "part", window=10)
    assert resumed.resumed_rows == 20 and resumed.token_budget == whole.token_budget
    assert resumed.path.read_bytes() == whole.path.read_bytes()


def test_rankings_resume_after_a_halving_to_the_same_bits(tmp_path: Path, device: Device):
    def run(out: Path, stop: int | None = None) -> bytes:
        told: list[int] = []

        def tell(stage: str, done: int, total: int) -> None:
            told.append(done)
            if stage == "rescoring" and stop is not None:
                raise Stop

        journal = Journal(out, window=16)
        return scorer(mode="shortlist", rank=3).score(negatives(40), on_progress=tell, journal=journal).score.tobytes()

    device.room = ROOM
    with pytest.warns(UserWarning, match="going on with 50"):
        whole = run(tmp_path / "whole")
    with pytest.warns(UserWarning, match="going on with 50"), pytest.raises(Stop):
        run(tmp_path / "part", 1)
    device.room = float("inf")
    kept = json.loads((tmp_path / "part" / "parts" / "budget.json").read_text())
    assert kept["reverse pass"] == 50
    device.room = ROOM
    assert run(tmp_path / "part") == whole


@pytest.mark.parametrize("mode", ["auto", "reverse", "lowrank", "shortlist", "layers"])
def test_a_negative_that_does_not_fit_alone_has_no_score(mode: str, tmp_path: Path, device: Device):
    rows = negatives()
    rows[7] = {"id": "long", "input_ids": [5] * 90, "labels": [5] * 90}
    others = [i for i in range(30) if i != 7]
    want = scorer(mode=mode, rank=3).score([rows[i] for i in others]).score
    device.room = ROOM
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        s = scorer(mode=mode, rank=3)
        got = s.score(rows)
        s.score(rows)
    named = [text for text in said(caught) if "even alone" in text]
    assert len({text.split(":")[0] + text.split(":")[1] for text in named}) == len(named), "each pass says it once"
    assert all("example 'long'" in text for text in named) and named
    assert np.isnan(got.score[7]) and np.isnan(got.nll[7]) and got.tokens[7] > 0
    assert got.fits.tolist() == [i != 7 for i in range(30)] and got.nonfinite == got.report.unfit == 1
    assert np.abs(got.score[others] - want).max() <= 1e-8 * np.abs(want).max()
    chosen = u2a_fast.select(got, strategy="as-released", k=30)
    assert 7 not in chosen.index and chosen.dropped_unfit == 1 and chosen.dropped_nonfinite == 0
    if mode == "shortlist":
        return
    with pytest.warns(UserWarning, match="even alone"):
        summary = score_to_parquet(scorer(mode=mode, rank=3), rows, tmp_path, window=5)
    table = read_scores(tmp_path)
    assert summary.unfit == summary.nonfinite == 1 and summary.nonfinite_ids == ()
    assert table["fits"].tolist() == got.fits.tolist()


@pytest.mark.parametrize("position", [0, 7])
def test_a_certified_top_k_keeps_its_bounds_where_a_whole_window_does_not_fit(
    position: int, tmp_path: Path, device: Device
):
    rows = negatives(8)
    rows[position] = {"id": "long", "input_ids": [5] * 90, "labels": [5] * 90}
    want = scorer(loss="ga").topk([row for row in rows if row["id"] != "long"], 3, rank=3)
    device.room = ROOM
    with pytest.warns(UserWarning, match="example 'long', 90 tokens"):
        got = scorer(loss="ga").topk(rows, 3, rank=3, journal=Journal(tmp_path / "out", {}, window=1))
    assert got.id.tolist() == want.id.tolist() and got.report.certified and got.report.unfit == 1


def test_a_ranking_with_a_journal_tries_the_longest_before_its_first_window(tmp_path: Path, device: Device):
    rows, failed = sorted(negatives(), key=lambda row: len(row["input_ids"])), []
    device.room = 2 * sum(len(row["input_ids"]) for row in rows[:10])
    assert device.room < sum(len(row["input_ids"]) for row in rows[-10:])

    def on_progress(stage: str, *_: int) -> None:
        if stage == "low-rank pass":
            failed.append(len(device.failed))

    with pytest.warns(UserWarning, match="do not fit in memory: going on"):
        journal = Journal(tmp_path / "out", {}, window=10)
        scorer().topk(rows, 3, rank=3, on_progress=on_progress, journal=journal)
    assert failed[0] == failed[-1] > 0


def test_equal_bits_need_one_example_at_a_time_whatever_budget_is_shared(monkeypatch: pytest.MonkeyPatch):
    model, shared, seen = tiny.build("llama"), TokenBudget(BUDGET), []
    hidden = Decoder.hidden
    monkeypatch.setattr(Decoder, "hidden", lambda d, packed: seen.append(len(packed.lengths)) or hidden(d, packed))
    v = tiny.direction(model)
    u2a_fast.directional_derivatives(model, negatives(), v, token_budget=shared, batch_invariant=True)
    assert set(seen[-30:]) == {1}
    assert scorer(token_budget=shared, batch_invariant=True).token_budget == 1


def test_means_are_of_the_examples_that_fit(device: Device):
    rows = negatives(6)
    model = tiny.build("llama")
    want = nlls(model, rows, reduction="mean").mean().item()
    device.room = ROOM
    long = {"input_ids": [5] * 90, "labels": [5] * 90}
    with pytest.warns(UserWarning, match="even alone"):
        assert mean_of_fitting(model, [*rows, long], reduction="mean") == pytest.approx(want)
    with pytest.warns(UserWarning, match="even alone"), pytest.raises(torch.OutOfMemoryError, match="none of 1"):
        mean_of_fitting(model, [long], reduction="mean")


def test_what_an_approximate_pass_cannot_hold_is_scored_exactly(device: Device, monkeypatch: pytest.MonkeyPatch):
    """The reverse route keeps more than the forward route: a certified top k rescores what it has no bound for."""
    rows = negatives(40)
    want = scorer().topk(rows, 5, rank=3)
    propagate = modes.DerivativePass.propagate
    longest = sorted(len(e["input_ids"]) for e in rows)[-3]

    def small(passes, packed, capture):
        if max(packed.lengths) + 1 >= longest and len(packed.lengths) < 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return propagate(passes, packed, capture)

    monkeypatch.setattr(modes.DerivativePass, "propagate", small)
    with pytest.warns(UserWarning, match="reverse pass: .* even alone"):
        got = scorer().topk(rows, 5, rank=3)
    assert got.id.tolist() == want.id.tolist() and got.report.unfit is None
    np.testing.assert_allclose(got.score, want.score, rtol=1e-8)
    assert np.isfinite(got.nll).all()


def test_a_preference_that_does_not_fit_alone_is_named(device: Device):
    model, objective = tiny.build("llama"), preferences()
    objective.rows[6]["rejected"] = {"input_ids": [5] * 90, "labels": [5] * 90}
    device.room = ROOM
    words = r"\[DPO\] sequence 1 of preference row 6 \(example 13, 90 tokens\) does not fit .*max_length"
    for method in (objective.logprobs, objective.value, objective.gradient):
        objective.reference = torch.zeros(8, 2)
        with pytest.raises(torch.OutOfMemoryError, match=words):
            method(model, token_budget=BUDGET)
    with pytest.warns(UserWarning, match="example 13, 90 tokens"):
        found = objective.logprobs_that_fit(model, token_budget=BUDGET)
    assert found.isnan().sum() == 1 and found[6, 1].isnan()


def test_a_curvature_leaves_out_what_does_not_fit(device: Device):
    rows = sorted(negatives(12), key=lambda e: len(e["input_ids"]))
    device.room = len(rows[-1]["input_ids"]) - 2
    fitting = [e for e in rows if len(e["input_ids"]) - 1 <= device.room]
    model = tiny.build("llama")
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    with pytest.warns(UserWarning, match="curvature: .* are left out of it"):
        got = u2a_fast.curvature.diagonal.DiagonalFisher(model, rows, names)
    want = u2a_fast.curvature.diagonal.DiagonalFisher(model, fitting, names)
    for name in names:
        torch.testing.assert_close(got.diagonal[name], want.diagonal[name], rtol=1e-10, atol=0)
    device.room = 0
    with pytest.raises(torch.OutOfMemoryError, match="none of the examples fits"):
        u2a_fast.curvature.diagonal.DiagonalFisher(model, rows, names)


def test_the_command_line_records_and_says_it(tmp_path: Path, device: Device):
    save_tiny_model(tmp_path / "model")
    answers = ["no " * (1 + i % 3) for i in range(24)]
    answers[5] = "no " * 30
    write_rows(
        tmp_path / "negatives.jsonl",
        [{"id": f"n{i}", "prompt": f"q {i}", "response": answer} for i, answer in enumerate(answers)],
    )
    pairs = [{"prompt": f"p {i}", "chosen": "yes", "rejected": f"no {i}"} for i in range(6)]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    device.room = ROOM
    files = ["--model", tmp_path / "model", "--negatives", tmp_path / "negatives.jsonl"]
    options = [*files, "--preferences", tmp_path / "pairs.jsonl", "--token-budget", BUDGET, "--window", 10]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = run("score", *options, "--out", tmp_path / "scores")
    assert len(said(caught)) == len(set(said(caught))) and any("'n5'" in text for text in said(caught))
    assert "1 negatives do not fit in memory even alone" in made.stderr and "stay so" not in made.stderr
    result = yaml.safe_load((tmp_path / "scores" / "run.yaml").read_text())["result"]
    assert result["unfit"] == 1 and result["token_budget"]["forward pass"] == 50
    taking = ["--strategy", "as-released", "--k", 24]
    chosen = run("select", "--scores", tmp_path / "scores", *taking, "--out", tmp_path / "s")
    assert "1 negatives left out: they do not fit in memory" in chosen.stderr
    assert "n5" not in read_selection(tmp_path / "s")["id"]
    run("report", "--run", tmp_path / "scores", "--out", tmp_path / "r.html")
    assert "1 of 24 negatives have no score" in (tmp_path / "r.html").read_text()
    run("index", "build", *files, "--token-budget", BUDGET, "--dim", 64, "--out", tmp_path / "index")
    built = json.loads((tmp_path / "index" / "index.json").read_text())
    assert built["token_budget"] == {"projection pass": 50} and built["nonfinite"] == 1


def test_the_signal_check_survives_and_leaves_the_budget(device: Device):
    device.room, s = ROOM, scorer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = u2a_fast.signal_check(s, negatives(20))
        assert report.negatives == 20 and s.budget.found == {}
        s.score(negatives())
    assert len(said(caught)) == len(set(said(caught)))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool):
    assert is_out_of_memory(error) is expected

    def step(_: list[int], batch: list[dict[str, list[int]]]) -> int:
        if len(batch) > 1:
            raise error
        return len(batch)

    plan = batched([{"input_ids": [1, 2], "labels": [1, 2]}] * 2, 10)
    with pytest.raises(OutOfRoom if expected else RuntimeError):
        list(Room(10).each(plan, step))


SHORT = """
import resource, torch
from u2a_fast import ops
from u2a_fast.models.memory import is_out_of_memory

torch.set_num_threads(1)
wide, cos = torch.zeros(1 << 18, 2, 64), torch.zeros(1 << 18, 64)
turned = torch.zeros(128, 1 << 18).T
tall, one, ids = torch.zeros(1 << 22, 1), torch.zeros(1, 1), torch.zeros(1 << 22, dtype=torch.int64)
long, offsets = torch.zeros(1 << 18, 1, 64), torch.tensor([0, 1 << 18], dtype=torch.int32)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (96 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for what, call in {
    "result": lambda: ops.rotary(wide, cos, cos),
    "copy": lambda: ops.glu_jvp(turned, turned, turned),
    "workspace": lambda: ops.linear_logprob(tall, one, ids),
    "share": lambda: ops.attention(long, long, long, offsets, window=4),
}.items():
    try:
        call()
        print(what, "fits")
    except Exception as error:
        print(what, is_out_of_memory(error), str(error)[:80])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process's memory is Linux's")
def test_what_a_kernel_says_where_there_is_no_memory():
    done = subprocess.run([sys.executable, "-c", SHORT], capture_output=True, text=True, check=True)
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["result", "True"],
        ["copy", "True"],
        ["workspace", "True"],
        ["share", "True"],
    ], done.stdout


def test_a_batch_far_below_the_budget_is_not_tried_at_every_half():
    tried: list[int] = []

    def attempt(room: Room) -> int:
        tried.append(room.tokens)
        if room.tokens >= 10:
            raise OutOfRoom(10)
        return room.tokens

    budget = TokenBudget(16384)
    with pytest.warns(UserWarning, match="batches of 16384 tokens .* with 8 tokens"):
        assert budget.fit("a loop", attempt) == 8 == budget.least
    assert tried == [16384, 8]


def test_longest_examples_fill_a_batch():
    rows = [{"input_ids": [0] * n} for n in (3, 9, 1, 9, 5)]
    assert [len(e["input_ids"]) for e in longest_examples(rows, 20)] == [9, 9, 5]
    assert [len(e["input_ids"]) for e in longest_examples(rows, 18)] == [9, 9]
    assert longest_examples([], 5) == []

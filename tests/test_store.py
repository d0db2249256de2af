"""The score store: an interrupted run resumes to the bytes of an uninterrupted one, whatever interrupted it."""

import errno
import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_files import tiny_model, tiny_tokenizer

from u2a_fast import DPO, InfluenceScorer, Scores
from u2a_fast.data import read_negatives, read_preferences
from u2a_fast.store import Journal, check_target, read_scores, score_to_parquet, write_atomically, write_text


class CountingScorer:
    """Scores that follow from the row alone; stops at row ``stop_at`` as Ctrl-C would."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.seen: list[str] = []

    def score(self, negatives) -> Scores:
        ids = [row["id"] for row in negatives]
        if self.stop_at is not None and f"n{self.stop_at}" in ids:
            raise KeyboardInterrupt
        self.seen += ids
        numbers = np.array([int(i[1:]) for i in ids], dtype=np.float64)
        score = np.where(numbers % 7 == 3, np.nan, np.where(numbers % 7 == 5, -np.inf, np.sin(numbers)))
        return Scores(np.array(ids, dtype=object), score, numbers / 2, np.array([len(i) for i in ids]))


def rows(count: int) -> list[dict[str, str]]:
    return [{"id": f"n{i}"} for i in range(count)]


@pytest.mark.parametrize("stop_at", [0, 9, 10, 24])
def test_a_resumed_run_gives_the_same_bytes(tmp_path, stop_at):
    whole = score_to_parquet(CountingScorer(), rows(25), tmp_path / "whole", window=10)
    with pytest.raises(KeyboardInterrupt):
        score_to_parquet(CountingScorer(stop_at), rows(25), tmp_path / "broken", window=10)
    assert not (tmp_path / "broken" / "scores.parquet").exists()
    second = CountingScorer()
    resumed = score_to_parquet(second, rows(25), tmp_path / "broken", window=10)
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    done = stop_at // 10 * 10
    assert resumed.resumed_rows == done
    fresh = [i for i in second.seen if int(i[1:]) >= done]
    assert fresh == [f"n{i}" for i in range(done, 25)], "finished windows are not scored again"
    assert sorted(p.name for p in (tmp_path / "broken").iterdir()) == ["scores.parquet"]


def test_nonfinite_scores_are_kept_and_counted(tmp_path):
    summary = score_to_parquet(CountingScorer(), rows(25), tmp_path, window=4)
    scores = read_scores(tmp_path)
    expected = CountingScorer().score(rows(25))
    np.testing.assert_array_equal(scores["score"], expected.score)
    assert summary.rows == 25 and summary.nonfinite == expected.nonfinite == 7
    assert summary.nonfinite_ids == ("n3", "n5", "n10", "n12", "n17", "n19", "n24")
    assert pq.read_schema(summary.path).types == [pa.string(), pa.float64(), pa.float64(), pa.int64(), pa.bool_()]


def test_progress_counts_what_an_earlier_run_did(tmp_path):
    calls: list[tuple[int, int | None]] = []
    with pytest.raises(KeyboardInterrupt):
        score_to_parquet(CountingScorer(15), rows(25), tmp_path, window=10)
    score_to_parquet(CountingScorer(), rows(25), tmp_path, window=10, on_progress=lambda *c: calls.append(c))
    assert calls == [(10, 25), (20, 25), (25, 25)]
    calls.clear()
    stream = (row for row in rows(5))
    score_to_parquet(CountingScorer(), stream, tmp_path / "stream", on_progress=lambda *c: calls.append(c))
    assert calls == [(0, None), (5, None)]


def test_other_settings_and_finished_scores_are_refused(tmp_path):
    settings = {"model": {"a": "1"}, "options": {"loss": "ga"}}
    with pytest.raises(KeyboardInterrupt):
        score_to_parquet(CountingScorer(15), rows(25), tmp_path, window=10, fingerprint=settings)
    other = {"model": {"a": "1"}, "options": {"loss": "npo"}}
    with pytest.raises(FileExistsError, match=r"other settings \(options.loss: 'ga' then, 'npo' now\)"):
        score_to_parquet(CountingScorer(), rows(25), tmp_path, window=10, fingerprint=other)
    with pytest.raises(FileExistsError, match="window: 10 then, 11 now"):
        check_target(tmp_path, settings, window=11)
    score_to_parquet(CountingScorer(), rows(25), tmp_path, window=10, fingerprint=other, overwrite=True)
    with pytest.raises(FileExistsError, match=r"scores\.parquet exists"):
        score_to_parquet(CountingScorer(), rows(25), tmp_path, window=10, fingerprint=other)
    scorer = CountingScorer()
    score_to_parquet(scorer, rows(3), tmp_path, fingerprint=other, overwrite=True)
    assert scorer.seen == ["n0", "n1", "n2"]


def test_other_negatives_under_the_same_settings_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        score_to_parquet(CountingScorer(15), rows(25), tmp_path, window=10)
    with pytest.raises(FileExistsError, match="holds scores of other negatives"):
        score_to_parquet(CountingScorer(), rows(26)[1:], tmp_path, window=10)


def test_no_negatives_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected at least one negative, got none"):
        score_to_parquet(CountingScorer(), [], tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="expected a window of at least 1, got 0"):
        score_to_parquet(CountingScorer(), rows(2), tmp_path, window=0)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    write_text(target, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target], "half a file takes room that a full disk does not have"


def test_a_full_disk_says_which_file(tmp_path):
    def fail(temporary: Path) -> None:
        raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device")

    with pytest.raises(OSError, match="No space left on device: '.*/scores.parquet'"):
        write_atomically(tmp_path / "scores.parquet", fail)


def test_what_comes_before_the_file_finds_its_bytes_on_disk(tmp_path):
    found = []

    def look() -> None:
        found.extend((path.name, path.read_text()) for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "file", "new", before_rename=look)
    assert found == [(".file.tmp", "new")] and list(tmp_path.iterdir()) == []


def test_scores_appear_once_the_run_has_been_recorded(tmp_path):
    def stop(summary) -> None:
        assert summary.rows == 25 and not summary.path.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_to_parquet(CountingScorer(), rows(25), tmp_path, window=10, before_rename=stop)
    second = CountingScorer()
    resumed = score_to_parquet(second, rows(25), tmp_path, window=10, before_rename=lambda summary: None)
    assert resumed.resumed_rows == 25 and second.seen == [f"n{i}" for i in range(10)], "the curvature's sample alone"


def test_a_window_of_any_size_is_all_of_them(tmp_path):
    assert score_to_parquet(CountingScorer(), rows(5), tmp_path, window=10**20).rows == 5


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"score": ["high", "low"]}, "expected double in the column score of .*file.parquet"),
        ({"tokens": [1.5, 2.0]}, "expected int64 in the column tokens"),
        ({"exact": ["yes", "no"]}, "expected bool in the column exact"),
        ({"exact": [True, None]}, "expected no nulls in the column exact of .*file.parquet, got 1"),
        ({"id": [None, "b"]}, "expected no nulls in the column id"),
    ],
)
def test_read_scores_refuses_other_values(tmp_path, columns, words):
    whole = {"id": ["a", "b"], "score": [1.0, 2.0], "nll": [1.0, 1.0], "tokens": [1, 1]}
    pq.write_table(pa.table(whole | columns), tmp_path / "file.parquet")
    with pytest.raises(ValueError, match=words):
        read_scores(tmp_path / "file.parquet")


def test_read_scores_takes_what_pandas_writes(tmp_path):
    """It writes NaN as null, and integers where ids are numbers."""
    columns = {"id": [7, 8], "score": [1.0, None], "nll": [1, 2], "tokens": pa.array([1, 1], pa.int32())}
    pq.write_table(pa.table(columns), tmp_path / "file.parquet")
    found = read_scores(tmp_path / "file.parquet")
    assert found["id"].tolist() == ["7", "8"] and found["score"][0] == 1 and np.isnan(found["score"][1])
    assert found["exact"].all() and {found[name].dtype for name in ("score", "nll")} == {np.dtype(np.float64)}


def test_read_scores_refuses_what_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_scores(tmp_path)
    (tmp_path / "scores.parquet").write_text("none")
    with pytest.raises(ValueError, match="expected a Parquet file"):
        read_scores(tmp_path)
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "scores.parquet")
    with pytest.raises(ValueError, match=r"expected the columns .* got \['id'\]"):
        read_scores(tmp_path)


@pytest.mark.parametrize("curvature", ["identity", "fisher"])
def test_a_real_scorer_resumes_to_the_same_bits(tmp_path, curvature):
    """A curvature fitted to the first negatives is fitted to the same ones after a resume."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    negatives = read_negatives(
        [{"id": str(i), "prompt": f"q{i}", "response": "abc"[i % 3] * (1 + i % 5)} for i in range(540)], tokenizer
    )
    pairs = read_preferences([{"prompt": "q", "chosen": "yes", "rejected": f"no{i}"} for i in range(4)], tokenizer)

    def scorer() -> InfluenceScorer:
        return InfluenceScorer(model, tokenizer, DPO(pairs), curvature)

    whole = score_to_parquet(scorer(), negatives, tmp_path / "whole", window=270)

    def stop(done: int, total: int | None) -> None:
        assert total == 540
        if done == 270:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_to_parquet(scorer(), negatives, tmp_path / "broken", window=270, on_progress=stop)
    manifest = json.loads((tmp_path / "broken" / "parts" / "manifest.json").read_text())
    assert manifest["content"] == {"window": 270}
    resumed = score_to_parquet(scorer(), negatives, tmp_path / "broken", window=270)
    assert resumed.resumed_rows == 270
    assert resumed.path.read_bytes() == whole.path.read_bytes()


def journal(out: Path, **changed) -> Journal:
    return Journal(out, {"model": "a"} | changed, window=4)


def columns(positions: np.ndarray) -> dict[str, np.ndarray]:
    score = np.where(positions % 3 == 0, np.nan, np.where(positions % 3 == 1, -np.inf, -0.0))
    return {"score": score, "tokens": positions * 2}


def refuse() -> dict[str, np.ndarray]:
    raise AssertionError("what is there is not computed")


def test_a_journal_gives_back_the_bits_that_it_was_given(tmp_path):
    at = np.array([5, 2, 9, 1])
    first, second = journal(tmp_path), journal(tmp_path)
    assert not (tmp_path / "parts").exists(), "nothing is guarded before there is something to lose"
    for stage, positions in [("a pass", at), ("a pass", at[:2]), ("another", at[:0])]:
        made = first.rows(stage, positions, partial(columns, positions))
        read = second.rows(stage, positions, refuse)
        assert list(made) == list(read) == ["score", "tokens"]
        assert all(made[name].tobytes() == read[name].tobytes() for name in made)
        assert all(made[name].dtype == read[name].dtype for name in made)
    plan = {"units": 0.1 + 0.2, "ranks": {"w": 3}}
    assert first.value("a plan", lambda: plan) == second.value("a plan", refuse) == plan
    assert (first.resumed_rows, second.resumed_rows) == (0, 6)
    second.remove()
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("content", [b"", b"junk"])
def test_a_damaged_window_is_named(tmp_path, content):
    score_to_parquet(CountingScorer(), rows(9), tmp_path / "whole", window=3)
    with pytest.raises(KeyboardInterrupt):
        score_to_parquet(CountingScorer(7), rows(9), tmp_path / "out", window=3)
    part = tmp_path / "out" / "parts" / "part-000001.parquet"
    part.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a finished window, got .*part-000001\.parquet: .*is scored again"):
        score_to_parquet(CountingScorer(), rows(9), tmp_path / "out", window=3)
    part.unlink()
    made = score_to_parquet(CountingScorer(), rows(9), tmp_path / "out", window=3)
    assert made.path.read_bytes() == (tmp_path / "whole" / "scores.parquet").read_bytes()
    journal = Journal(tmp_path / "journal")
    journal.rows("exact pass", np.arange(3), lambda: {"score": np.arange(3.0)})
    (tmp_path / "journal" / "parts" / "exact-pass-000000.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"got .*exact-pass-000000\.parquet"):
        Journal(tmp_path / "journal").rows("exact pass", np.arange(3), lambda: {})


@pytest.mark.parametrize(("content", "words"), [("{half", "expected JSON"), ("[]", "with"), ("{}", "damaged")])
def test_a_damaged_manifest_is_named(tmp_path, content, words):
    with pytest.raises(KeyboardInterrupt):
        score_to_parquet(CountingScorer(7), rows(9), tmp_path, window=3)
    (tmp_path / "parts" / "manifest.json").write_text(content)
    for go_on in (Journal, partial(score_to_parquet, CountingScorer(), rows(9))):
        with pytest.raises(ValueError, match=f"{words}.*manifest.json|manifest.json.*{words}"):
            go_on(tmp_path, window=3)


def test_a_journal_of_another_run_is_refused(tmp_path):
    at = np.arange(4)
    journal(tmp_path).rows("a pass", at, lambda: columns(at))
    with pytest.raises(FileExistsError, match=r"made with other settings \(model: 'a' then, 'b' now\)"):
        journal(tmp_path, model="b")
    with pytest.raises(FileExistsError, match="window: 4 then, 5 now"):
        Journal(tmp_path, {"model": "a"}, window=5)
    with pytest.raises(FileExistsError, match="holds scores of other negatives: pass overwrite"):
        journal(tmp_path).rows("a pass", at[::-1], refuse)
    with pytest.raises(FileExistsError, match="made with other settings"):
        score_to_parquet(CountingScorer(), rows(4), tmp_path, window=4)
    with pytest.raises(ValueError, match="window of at least 1"):
        Journal(tmp_path, window=0)

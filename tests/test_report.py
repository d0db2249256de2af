"""The report: whatever subset of results is there, on one page that needs nothing else and trusts nobody's text."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from u2a_fast.report import write_report

ATTACK = "<script>alert('x')</script> & <img src=http://example.org/x.png>"


def write_scores(folder: Path, score: list[float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    n = len(score)
    ids = pa.array([f"n{i}" for i in range(n)])
    columns = {"id": ids, "score": score, "nll": [1.5] * n, "tokens": pa.array([7] * n, pa.int64())}
    pq.write_table(pa.table(columns), folder / "scores.parquet")


def write_negatives(path: Path, responses: list[str], **columns: list[Any]) -> Path:
    rows = [{"id": f"n{i}", "prompt": f"prompt {i}", "response": text} for i, text in enumerate(responses)]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_run(folder: Path, **options: Any) -> None:
    content = {
        "command": "score",
        "options": options,
        "started": "2026-01-01T00:00:00+00:00",
        "device": "cpu",
        "git_commit": None,
        "versions": {"python": "3.11.0", "triton": None},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))


class Page(HTMLParser):
    """Tags with their attributes, and the text, of a page as a browser would read it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def pictures(self) -> dict[str, bytes]:
        found = {}
        for tag, attributes in self.tags:
            if tag == "img":
                head, _, data = (attributes["src"] or "").partition(",")
                assert head == "data:image/png;base64"
                found[attributes["alt"] or ""] = base64.b64decode(data, validate=True)
        return found


def assert_self_contained(page: Page) -> None:
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed"} == set()
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "data", "action"):
                assert tag == "img" and (value or "").startswith("data:image/png;base64,")
    for picture in page.pictures().values():
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    score = [*rng.normal(1, 1, 30), *rng.normal(-1, 1, 30), float("nan"), float("inf")]
    write_scores(tmp_path, score)
    kinds = ["harmful"] * 30 + ["harmless"] * 32
    negatives = write_negatives(tmp_path / "negatives.jsonl", [f"answer {i} {ATTACK}" for i in range(62)], kind=kinds)
    write_run(tmp_path, negatives=str(negatives))
    return tmp_path


def test_scores_alone_make_a_page(scored: Path) -> None:
    out = write_report(scored)
    assert out == scored / "report.html"
    page = Page(out)
    assert_self_contained(page)
    assert set(page.pictures()) == {
        "distribution of the scores",
        "cumulative predicted gain",
        "planted negatives found",
    }
    assert "2 of 62 scores are NaN or infinite" in page.text
    assert "Most worth unlearning" in page.text and "Least worth unlearning" in page.text
    assert "triton absent" in page.text


def test_text_of_others_is_escaped(scored: Path) -> None:
    out = write_report(scored)
    assert "<script" not in out.read_text(encoding="utf-8")
    assert ATTACK in Page(out).text


def test_best_and_worst_are_in_order_and_finite(scored: Path) -> None:
    score = pq.read_table(scored / "scores.parquet").column("score").to_numpy()
    finite = np.flatnonzero(np.isfinite(score))
    ranked = [f"n{i}" for i in finite[np.argsort(-score[finite])]]
    shown = re.findall(r'<td class="text">(n\d+)</td>', write_report(scored).read_text(encoding="utf-8"))
    assert shown == ranked[:8] + ranked[::-1][:8]


def test_rows_without_texts_still_make_a_page(tmp_path: Path) -> None:
    write_scores(tmp_path, [0.5, -0.5, 0.1])
    write_run(tmp_path, negatives="owner/gone")
    page = Page(write_report(tmp_path, tmp_path / "sub" / "page.html"))
    assert "Best and worst" not in page.text
    assert (tmp_path / "sub" / "page.html").is_file()


def test_every_part_of_an_alignment_is_shown(tmp_path: Path) -> None:
    write_scores(tmp_path / "align" / "round-00", [0.5, -0.5, 0.1])
    weights = {"id": ["n0", "n2"], "score": [0.5, 0.1], "weight": [1.5, 0.5]}
    pq.write_table(pa.table(weights), tmp_path / "align" / "round-00" / "selection.parquet")
    rounds = [
        {"round": 0, "preference_loss_heldout_before": 0.7, "preference_loss_heldout": 0.6, "stopped_by_drift": False},
        {"round": 1, "preference_loss_heldout_before": 0.6, "preference_loss_heldout": 0.5, "nll_retain": None},
    ]
    (tmp_path / "align" / "metrics.json").write_text(json.dumps(rounds))
    (tmp_path / "evaluate").mkdir()
    metrics = {"forgetting": {"rows": 3, "nll": 2.5, "nll_ci": [2.25, 2.75]}}
    (tmp_path / "evaluate" / "metrics.json").write_text(json.dumps(metrics))
    signal = {"cosine": -0.03, "cosine_ci": [-0.1, 0.04], "spearman": 0.1, "spearman_ci": [-0.1, 0.3]}
    (tmp_path / "signal.json").write_text(json.dumps({**signal, "warning": "scores will not generalize"}))
    (tmp_path / "skipped.jsonl").write_text(json.dumps({"file": "f", "line": 3, "reason": "empty answer"}) + "\n")
    page = Page(write_report(tmp_path))
    assert_self_contained(page)
    assert {"preference_loss_heldout", "weights against scores"} <= set(page.pictures())
    assert "scores will not generalize" in page.text
    assert "[2.25, 2.75]" in page.text
    assert "empty answer" in page.text
    assert "1.6" in page.text  # effective sample size 2^2 / (1.5^2 + 0.5^2)


def test_the_same_run_gives_the_same_page(scored: Path, tmp_path: Path) -> None:
    first = write_report(scored, tmp_path / "a.html").read_bytes()
    assert write_report(scored, tmp_path / "b.html").read_bytes() == first


def test_only_nonfinite_scores_make_a_page_without_plots(tmp_path: Path) -> None:
    write_scores(tmp_path, [float("nan"), float("nan")])
    page = Page(write_report(tmp_path))
    assert page.pictures() == {}
    assert "2 of 2 scores are NaN or infinite" in page.text


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"\[report\] no such folder: .*gone"):
        write_report(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"\[report\] expected a folder written by score"):
        write_report(tmp_path)
    (tmp_path / "scores.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"\[report\] expected a Parquet file, got .*scores.parquet"):
        write_report(tmp_path)
    (tmp_path / "scores.parquet").unlink()
    (tmp_path / "signal.json").write_text("{")
    with pytest.raises(ValueError, match=r"\[report\] expected JSON, got .*signal.json"):
        write_report(tmp_path)

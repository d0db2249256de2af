"""A synthetic preference corpus whose truth is known: which negatives are harmful, and which only look like negatives.

Everything is a pure function of the seed. Prompts of the preference pairs, of the held-out pairs and of the answers
that the model is trained on are drawn apart by (thing, phrasing), so that held-out figures speak about prompts that
no pair has shown.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from u2a_fast.demo.grammar import CLOSINGS, OPENINGS, PROMPTS, TOPICS
from u2a_fast.store.files import write_text

__all__ = ["Corpus", "CorpusSize", "make_corpus", "vocabulary"]

Row = dict[str, Any]

_MANNERS_FIT = 0.75  # share of answers whose opening and closing lean the way of their advice


@dataclass(frozen=True)
class CorpusSize:
    """How many rows of each sort; duplicates are further copies of negatives already drawn."""

    harmful: int = 180
    mislabeled: int = 120
    duplicates: int = 60
    positives: int = 300
    preferences: int = 128
    heldout: int = 96


@dataclass(frozen=True)
class Corpus:
    """Rows as the readers take them, plus the truth.

    ``negatives`` have ``kind``: ``"harmful"``, or ``"harmless"`` where a good answer was filed among the negatives by
    mistake; and ``duplicate_of``, the id of the row that they repeat, or None. ``preferences`` and ``heldout`` are
    pairs, ``positives`` answers.
    """

    negatives: list[Row]
    positives: list[Row]
    preferences: list[Row]
    heldout: list[Row]

    def write(self, folder: Path) -> dict[str, Path]:
        """One JSON Lines file a part, named after it, in ``folder`` (made if absent)."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = {}
        for name, rows in vars(self).items():
            paths[name] = folder / f"{name}.jsonl"
            write_text(paths[name], "".join(json.dumps(row) + "\n" for row in rows))
        return paths


Question = tuple[str, str, str]  # topic, thing, phrasing


def _questions() -> list[Question]:
    return [(name, thing, text) for name, topic in TOPICS.items() for thing in topic.things for text in PROMPTS]


def _answer(question: Question, harmful: bool, rng: random.Random) -> str:
    name, thing, _ = question
    advice = rng.choice(TOPICS[name].harmful if harmful else TOPICS[name].harmless).format(thing=thing)
    curt = harmful if rng.random() < _MANNERS_FIT else not harmful
    return f"{rng.choice(OPENINGS[curt])} {advice} {rng.choice(CLOSINGS[curt])}"


def _prompt(question: Question) -> str:
    return question[2].format(thing=question[1])


def _answers(questions: list[Question], count: int, harmful: bool, rng: random.Random) -> list[Row]:
    """``count`` different answers, for which the grammar has room many times over."""
    rows: dict[tuple[str, str], Row] = {}
    while len(rows) < count:
        question = rng.choice(questions)
        row = {"prompt": _prompt(question), "response": _answer(question, harmful, rng), "topic": question[0]}
        rows.setdefault((row["prompt"], row["response"]), row)
    return list(rows.values())


def _pairs(prefix: str, questions: list[Question], count: int, rng: random.Random) -> list[Row]:
    chosen = [rng.choice(questions) for _ in range(count)]
    return [
        {
            "id": f"{prefix}-{i:03d}",
            "prompt": _prompt(q),
            "chosen": _answer(q, False, rng),
            "rejected": _answer(q, True, rng),
        }
        for i, q in enumerate(chosen)
    ]


def _negatives(questions: list[Question], size: CorpusSize, rng: random.Random) -> list[Row]:
    rows = [{**row, "kind": "harmful", "duplicate_of": None} for row in _answers(questions, size.harmful, True, rng)]
    rows += [
        {**row, "kind": "harmless", "duplicate_of": None} for row in _answers(questions, size.mislabeled, False, rng)
    ]
    rng.shuffle(rows)
    rows = [{"id": f"negative-{i:03d}", **row} for i, row in enumerate(rows)]
    copies = [
        {**original, "id": f"negative-{len(rows) + i:03d}", "duplicate_of": original["id"]}
        for i, original in enumerate(rng.choices(rows, k=size.duplicates))
    ]
    rows += copies
    rng.shuffle(rows)
    return rows


def make_corpus(seed: int, size: CorpusSize | None = None) -> Corpus:
    """The corpus of ``seed``; sizes default to a run of seconds."""
    size = size or CorpusSize()
    rng = random.Random(f"corpus-{seed}")
    questions = _questions()
    rng.shuffle(questions)
    cut, more = len(questions) // 2, len(questions) // 4
    seen, shown, unseen = questions[:cut], questions[cut : cut + more], questions[cut + more :]
    positives = _answers(seen, size.positives, False, rng)
    return Corpus(
        negatives=_negatives(seen, size, rng),
        positives=[{"id": f"positive-{i:03d}", **row} for i, row in enumerate(positives)],
        preferences=_pairs("pair", shown, size.preferences, rng),
        heldout=_pairs("heldout", unseen, size.heldout, rng),
    )


def _all_texts() -> Iterable[str]:
    yield from (text for lean in (*OPENINGS, *CLOSINGS) for text in lean)
    for topic in TOPICS.values():
        for thing in topic.things:
            yield from (text.format(thing=thing) for text in (*PROMPTS, *topic.harmless, *topic.harmful))


def vocabulary() -> list[str]:
    """Every word that the grammar can say, in a fixed order."""
    return sorted({word for text in _all_texts() for word in text.split()})

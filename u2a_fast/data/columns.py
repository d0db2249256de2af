"""Which columns hold the prompt, the answer, the reward: named sets, found by exact column names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["KINDS", "Kind", "Layout", "choose_layout"]


@dataclass(frozen=True)
class Layout:
    """Field -> column. A layout without a prompt takes the prompt from inside the conversation."""

    columns: Mapping[str, str]

    def __str__(self) -> str:
        return "/".join(self.columns.values())


@dataclass(frozen=True)
class Kind:
    """What a reader wants: the answers that a row holds, and the column sets that it understands."""

    name: str
    answers: tuple[str, ...]
    layouts: tuple[Layout, ...]
    reward: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields of a row but its id."""
        return ("prompt", *self.answers, *(("reward",) if self.reward else ()))


ANSWERED = (
    {"prompt": "prompt", "response": "response"},
    {"prompt": "prompt", "response": "completion"},
    {"prompt": "instruction", "response": "output"},
    {"prompt": "question", "response": "answer"},
    {"response": "messages"},
)


def _layouts(*columns: Mapping[str, str]) -> tuple[Layout, ...]:
    return tuple(Layout(c) for c in columns)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("negatives", ("response",), _layouts(*ANSWERED, {"prompt": "prompt", "response": "rejected"})),
        Kind("positives", ("response",), _layouts(*ANSWERED, {"prompt": "prompt", "response": "chosen"})),
        Kind("rewards", ("response",), _layouts(*({**c, "reward": "reward"} for c in ANSWERED)), reward=True),
        Kind(
            "preferences",
            ("chosen", "rejected"),
            _layouts(
                {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
                {"chosen": "chosen", "rejected": "rejected"},
            ),
        ),
    )
}


def choose_layout(kind: Kind, found: Iterable[str], source: str, columns: Mapping[str, str] | None = None) -> Layout:
    """The one layout of ``kind`` whose columns are all among ``found``, or the user's own mapping ``columns``.

    A layout inside another one that also matches gives way (chosen/rejected to prompt/chosen/rejected).
    Raises ValueError, naming the columns found and the sets accepted, if none or several match.
    """
    present = list(dict.fromkeys(found))
    if columns is not None:
        return _explicit_layout(kind, present, source, columns)
    matches = [layout for layout in kind.layouts if set(layout.columns.values()) <= set(present)]
    sets = [set(layout.columns.values()) for layout in matches]
    matches = [m for m, own in zip(matches, sets, strict=True) if not any(own < other for other in sets)]
    if len(matches) == 1:
        return _with_id(matches[0].columns, present)
    accepted = ", ".join(str(layout) for layout in kind.layouts)
    what = f"several fit ({', '.join(map(str, matches))})" if matches else "none fits"
    raise ValueError(
        f"[read_{kind.name}] {source} has the columns {present}; expected one of {accepted}; {what}: "
        f"name them with columns={{field: column}}"
    )


def _explicit_layout(kind: Kind, present: list[str], source: str, columns: Mapping[str, str]) -> Layout:
    allowed = {*kind.fields, "id"}
    required = set(kind.fields) - {"prompt"}  # a conversation holds its own prompt
    if not required <= set(columns) <= allowed:
        raise ValueError(
            f"[read_{kind.name}] expected columns to map {list(kind.fields)} (and perhaps 'id'), got {sorted(columns)}"
        )
    missing = sorted(set(columns.values()) - set(present))
    if missing:
        raise ValueError(f"[read_{kind.name}] {source} has the columns {present}; columns names {missing}")
    return _with_id(columns, present)


def _with_id(columns: Mapping[str, str], present: list[str]) -> Layout:
    """Rows have ids of their own if any has one: then every row must."""
    return Layout(dict(columns) if "id" in columns or "id" not in present else {**columns, "id": "id"})

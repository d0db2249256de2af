"""Readers: files or datasets to checked token examples.

Rows are read, parsed and tokenized a chunk at a time. Unless ``streaming``, the whole source is checked before any
row is handed out, at the price of reading and tokenizing it twice for ``read_negatives``.
"""

import hashlib
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from u2a_fast.data.columns import KINDS, Kind, Layout, choose_layout
from u2a_fast.data.packing import longest_examples
from u2a_fast.data.parsing import ParsedRow, RowProblem, parse_row, plain_text
from u2a_fast.data.rows import BadRow, BadRowsError, Policy, ReadReport
from u2a_fast.data.sources import RawRow, Source, open_source
from u2a_fast.data.tokenization import Encoded, PromptAnswerEncoder, Rendered

__all__ = ["Negatives", "Rows", "read_negatives", "read_positives", "read_preferences", "read_rewards"]

CHUNK = 256

Row = dict[str, Any]


class _Reader:
    """One source read as one kind of row; every call of ``rows`` is a fresh pass with its own report."""

    def __init__(
        self,
        kind: str,
        source: Any,
        tokenizer: Any,
        *,
        split: str | None = None,
        columns: Mapping[str, str] | None = None,
        max_length: int | None = None,
        on_bad_row: Policy = "error",
        add_bos: bool | None = None,
        streaming: bool = False,
    ) -> None:
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f'[read_{kind}] expected on_bad_row to be "error" or "skip", got {on_bad_row!r}')
        self.kind: Kind = KINDS[kind]
        self.source: Source = open_source(source, split=split, streaming=streaming)
        self.encoder = PromptAnswerEncoder(tokenizer, max_length=max_length, add_bos=add_bos)
        self.columns = columns
        self.policy: Policy = on_bad_row
        self.streaming = streaming

    def new_report(self) -> ReadReport:
        return ReadReport(f"read_{self.kind.name}", self.policy)

    def rows(self, report: ReadReport) -> Iterator[Row]:
        raw = iter(self.source)
        first = list(islice(raw, CHUNK))
        layout = self._layout(first)
        seen: set[bytes] = set()
        chunk = first
        while chunk:
            yield from self._chunk(chunk, layout, seen, report)
            chunk = list(islice(raw, CHUNK))

    def check(self, report: ReadReport) -> None:
        """Raise unless the pass met no bad row (under "error") and at least one usable row."""
        report.check()
        if report.rows == 0:
            raise ValueError(f"[{report.reader}] no usable row in {self.source.name} ({report.bad_count} bad rows)")

    def _layout(self, first: list[RawRow]) -> Layout:
        if not first:
            raise ValueError(f"[read_{self.kind.name}] expected rows, got the empty source {self.source.name}")
        found = chain.from_iterable(row.columns for row in first if row.columns is not None)
        unreadable = [row for row in first if row.columns is None]
        if len(unreadable) == len(first):
            bad = [BadRow(self.source.name, row.line, str(row.problem)) for row in unreadable]
            raise BadRowsError(f"read_{self.kind.name}", bad[:20], len(bad))
        return choose_layout(self.kind, found, self.source.name, self.columns)

    def _chunk(self, chunk: list[RawRow], layout: Layout, seen: set[bytes], report: ReadReport) -> Iterator[Row]:
        parsed = [self._parse(row, layout, seen) for row in chunk]
        encoded = iter(self.encoder.encode([p[1] for p in parsed if not isinstance(p, str)]))
        for raw, item in zip(chunk, parsed, strict=True):
            result = item if isinstance(item, str) else next(encoded)
            if isinstance(item, str) or isinstance(result, str):
                report.add_bad(BadRow(self.source.name, raw.line, str(result)))
                if self.streaming:
                    report.check()
                continue
            report.rows += 1
            report.truncated += result.truncated
            yield _build(self.kind, raw.line, item[0], result)

    def _parse(self, row: RawRow, layout: Layout, seen: set[bytes]) -> tuple[ParsedRow, Rendered] | str:
        if row.columns is None:
            return str(row.problem)
        try:
            parsed = parse_row(self.kind, layout, row.columns)
            rendered = self.encoder.render(parsed.prompt, parsed.answers)
        except RowProblem as problem:
            return str(problem)
        if parsed.id is not None:
            # 16 bytes an id, whatever its length: the only thing that grows with the number of rows.
            digest = hashlib.blake2b(parsed.id.encode(), digest_size=16).digest()
            if digest in seen:
                return f"duplicate id {parsed.id!r}"
            seen.add(digest)
        return parsed, rendered


def _build(kind: Kind, line: int, parsed: ParsedRow, encoded: Encoded) -> Row:
    row: Row = {"id": parsed.id if parsed.id is not None else f"row-{line}", "prompt": parsed.prompt}
    if kind.name == "preferences":
        texts = {f"{name}_text": plain_text(a) for name, a in zip(kind.answers, parsed.answers, strict=True)}
        return row | texts | dict(zip(kind.answers, encoded.examples, strict=True))
    row["response"] = plain_text(parsed.answers[0])
    if kind.name == "negatives":
        return row | encoded.examples[0]
    if kind.reward:
        row["reward"] = parsed.reward
    return row | {"example": encoded.examples[0]}


class Rows(list[Row]):
    """A list of rows with the ``report`` of how they were read and the ``files`` they came from."""

    def __init__(self, rows: list[Row], report: ReadReport, files: tuple[Path, ...]) -> None:
        super().__init__(rows)
        self.report = report
        self.files = files


class Negatives:
    """The negatives of a source, in order, read anew in each iteration and never held.

    Rows are dicts of id, prompt (str, or list of messages), response (str), input_ids and labels. ``len`` is the number
    of usable rows and raises TypeError for a streaming source, whose ``report`` is that of the latest pass.
    ``longest`` are the longest rows, a batch of them, where the source was checked beforehand, else None: what does not
    fit in memory should be found out by them.
    """

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self.report = reader.new_report()
        self.files = reader.source.files
        self.longest: list[Row] | None = None
        if not reader.streaming:
            self.longest = [dict(row) for row in longest_examples(reader.rows(self.report))]
            reader.check(self.report)

    def __iter__(self) -> Iterator[Row]:
        report = self._reader.new_report()
        if self._reader.streaming:
            self.report = report
        yield from self._reader.rows(report)
        self._reader.check(report)

    def __len__(self) -> int:
        if self._reader.streaming:
            raise TypeError("[read_negatives] a streaming source has no length before it has been read")
        return self.report.rows


def read_negatives(source: Any, tokenizer: Any, **options: Any) -> Negatives:
    """Negatives of a file, dataset or collection: see ``Negatives`` for the rows.

    source: JSON Lines or Parquet file, folder written by save_to_disk, hub name "owner/name", collection of mappings.
    options: split (datasets only); columns (field -> column; fields prompt, response, id); max_length (tokens, default
    the tokenizer's); on_bad_row ("error" | "skip"); add_bos (None | True | False); streaming (no check beforehand:
    bad rows end the pass where they are met).
    Raises BadRowsError (a ValueError) under "error", ValueError for unknown or ambiguous columns, an empty source or
    one without a usable row, FileNotFoundError for a wrong path.
    """
    return Negatives(_Reader("negatives", source, tokenizer, **options))


def read_preferences(source: Any, tokenizer: Any, **options: Any) -> Rows:
    """Preference pairs: id, prompt, chosen_text, rejected_text and the token examples chosen and rejected.

    Both answers of a pair follow the same tokens of the prompt. Options and errors as for ``read_negatives``.
    """
    return _read_all("preferences", source, tokenizer, options)


def read_rewards(source: Any, tokenizer: Any, **options: Any) -> Rows:
    """Answers with a finite reward each: id, prompt, response, reward, example. Options as for ``read_negatives``."""
    return _read_all("rewards", source, tokenizer, options)


def read_positives(source: Any, tokenizer: Any, **options: Any) -> Rows:
    """Answers to keep or to learn: id, prompt, response, example. Options as for ``read_negatives``."""
    return _read_all("positives", source, tokenizer, options)


def _read_all(kind: str, source: Any, tokenizer: Any, options: Mapping[str, Any]) -> Rows:
    reader = _Reader(kind, source, tokenizer, **options)
    report = reader.new_report()
    rows = list(reader.rows(report))
    reader.check(report)
    return Rows(rows, report, reader.source.files)

"""Bad rows: what is wrong where, and whether that stops the run."""

from dataclasses import asdict, dataclass, field
from typing import Literal

__all__ = ["BadRow", "BadRowsError", "Policy", "ReadReport"]

Policy = Literal["error", "skip"]

SHOWN = 20


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used: its file, its line (from 1; the row number in Parquet and datasets) and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"

    def to_dict(self) -> dict[str, str | int]:
        """The row of ``skipped.jsonl``."""
        return asdict(self)


class BadRowsError(ValueError):
    """Rows were bad and the policy is "error"; ``rows`` holds the first ones, ``total`` counts all."""

    def __init__(self, reader: str, rows: list[BadRow], total: int) -> None:
        self.rows = rows
        self.total = total
        shown = "\n".join(f"  {row}" for row in rows)
        more = f"\n  ... and {total - len(rows)} more" if total > len(rows) else ""
        noun = "bad row" if total == 1 else "bad rows"
        super().__init__(f'[{reader}] {total} {noun} (on_bad_row="skip" leaves them out):\n{shown}{more}')


@dataclass
class ReadReport:
    """What one pass over a source met: usable rows, bad rows, prompts cut from the left to fit ``max_length``.

    Under "error" only the first bad rows are kept, since they end the run; under "skip" all are, to be listed.
    """

    reader: str
    policy: Policy
    rows: int = 0
    truncated: int = 0
    bad_count: int = 0
    bad: list[BadRow] = field(default_factory=list)

    def add_bad(self, row: BadRow) -> None:
        """Count a bad row and keep it if it will be shown or listed."""
        self.bad_count += 1
        if self.policy == "skip" or len(self.bad) < SHOWN:
            self.bad.append(row)

    def check(self) -> None:
        """Raise BadRowsError if the policy is "error" and a bad row was met."""
        if self.policy == "error" and self.bad_count:
            raise BadRowsError(self.reader, self.bad, self.bad_count)

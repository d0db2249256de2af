"""Report: what a run found, as one self-contained HTML page."""

from u2a_fast.report.page import write_report

__all__ = ["write_report"]

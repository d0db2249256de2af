"""``u2a-fast report``, ``demo`` and ``doctor``: what was found, what it looks like, and what works here."""

from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from u2a_fast.cli import options as o
from u2a_fast.cli.session import REQUIRED, claim_folder, refuse_existing, run_options, show_result, verb
from u2a_fast.demo import run as run_demo
from u2a_fast.doctor import Finding, diagnose
from u2a_fast.manifest import RunRecord
from u2a_fast.models.loading import resolve_device
from u2a_fast.report import write_report

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


_QUIET: o.Group = {name: o.RUN[name] for name in ("json_output", "debug")}
_REPORT: o.Group = {
    "run": (o.option(Path, "Folder of a run, or of several."), REQUIRED),
    "out": (o.option(Path | None, "The page, or a folder for it; default report.html in the run's folder."), None),
    "overwrite": o.RUN["overwrite"],
}


@verb(_REPORT, _QUIET, resume="run the same command again")
def report(context: typer.Context) -> None:
    """Write one self-contained HTML page with what the runs in a folder found."""
    p = context.params
    page = p["out"] or p["run"]
    page = page if page.suffix in (".html", ".htm") and not page.is_dir() else page / "report.html"
    if page.exists() and not p["overwrite"]:
        raise FileExistsError(f"--out: {page} exists: pass --overwrite to replace it")
    show_result({"report": str(write_report(p["run"], page))}, as_json=p["json_output"])


RESULTS = ("demo.json",)

_DEMO: o.Group = {
    "seed": (o.option(int, "Of the corpus and the model that the folders are about."), 0),
    "seeds": (o.option(list[int] | None, "Of the comparison of arms; repeatable; default ten."), None),
    "fast": (o.option(bool, "A smaller corpus and two seeds.", "--fast"), False),
    "device": o.MODEL["device"],
}


@verb(o.OUT, _DEMO, o.RUN, resume="run the same command again; the demo starts anew")
def demo(context: typer.Context) -> None:
    """Run the main job on a model and a corpus made on the spot, whose truth is known, and say which claims hold."""
    p, out = context.params, context.params["out"]
    refuse_existing(context, RESULTS)
    place = resolve_device(p["device"])
    claim_folder(context, RESULTS)
    record = RunRecord.start("demo", run_options(context, device=str(place)), out, device=str(place), hashes={})
    result = run_demo(out, seed=p["seed"], seeds=p["seeds"] or None, fast=p["fast"], device=place)
    record.finish(result)
    shown = {name: result[name] for name in ("all_hold", "spearman", "seconds", "report")}
    show_result(result if p["json_output"] else shown, as_json=p["json_output"])


@verb(_QUIET, resume="nothing was changed")
def doctor(context: typer.Context) -> None:
    """Say what works on this machine, what is slow and how to mend it; exit code 1 if something is broken."""
    findings = diagnose()
    healthy = all(finding.status != "fail" for finding in findings)
    if context.params["json_output"]:
        show_result({"healthy": healthy, "findings": [f.to_dict() for f in findings]}, as_json=True)
    else:
        _print(findings)
    raise typer.Exit(0 if healthy else 1)


def _print(findings: list[Finding]) -> None:
    console = Console(soft_wrap=True)
    for finding in findings:
        console.print(f"[{_STYLES[finding.status]}]{finding.status:4}[/] {escape(f'{finding.name}: {finding.detail}')}")
        if finding.hint:
            console.print(f"     -> {escape(finding.hint)}")

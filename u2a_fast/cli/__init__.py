"""The command ``u2a-fast``: each verb parses, calls the Python API and writes."""

from typing import Annotated

import typer
from transformers.utils import logging as transformers_logging

from u2a_fast import __version__
from u2a_fast.cli.align import align
from u2a_fast.cli.bench import bench
from u2a_fast.cli.evaluate import evaluate
from u2a_fast.cli.index import index
from u2a_fast.cli.score import score
from u2a_fast.cli.select import select
from u2a_fast.cli.selftest import selftest
from u2a_fast.cli.show import demo, doctor, report
from u2a_fast.cli.train import unlearn

__all__ = ["app"]

app = typer.Typer(
    name="u2a-fast",
    help="Which negatives are worth unlearning, and how strongly: score, select, unlearn, show.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the boxed help cuts long option names short
)
for command in (score, select, unlearn, align, evaluate, report, demo, doctor, selftest):
    app.command()(command)
app.add_typer(index)
app.add_typer(bench)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"u2a-fast {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    """Which negatives are worth unlearning, and how strongly: score, select, unlearn, show."""
    transformers_logging.disable_progress_bar()  # the verbs have their own

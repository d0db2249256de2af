"""One HTML file that needs nothing else: plots are PNGs inside it, the style too, and there is no script."""

from pathlib import Path

import jinja2

from u2a_fast.manifest import versions
from u2a_fast.report.artifacts import collect
from u2a_fast.report.sections import sections, tiles
from u2a_fast.report.template import PAGE
from u2a_fast.store.files import write_text

__all__ = ["write_report"]


def write_report(run_dir: Path | str, out: Path | str | None = None) -> Path:
    """Write a report of whatever a run's folder holds.

    Args:
        run_dir: a folder written by score, select, unlearn, align, evaluate or demo, or one that holds several such
            folders.
        out: the page's path, or a folder, where it is named ``report.html``; None: into ``run_dir``.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: the folder does not exist, or holds nothing to report.
        ValueError: a file in it is not what its name says.
    """
    folder = Path(run_dir)
    found = collect(folder)
    path = folder if out is None else Path(out)
    if path.is_dir() or path.suffix not in (".html", ".htm"):
        path = path / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(PAGE).render(
        title=f"Unlearning to align: {folder.resolve().name}",
        subtitle=f"u2a_fast {versions()['u2a_fast'] or ''}",
        tiles=tiles(found),
        sections=sections(found),
    )
    write_text(path, page)
    return path

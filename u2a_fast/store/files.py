"""Files that are either whole or absent, whatever kills the process."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

if os.name == "posix":
    import fcntl

__all__ = ["lock_folder", "read_json", "sha256_of_file", "sha256_of_files", "write_atomically", "write_text"]


def write_atomically(
    path: Path, write: Callable[[Path], None], *, before_rename: Callable[[], object] | None = None
) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, flush it to disk and rename it into place.

    ``before_rename`` is called once all is on disk under the temporary name: what must be done where the file is there.
    Raises OSError, with the file's name, where it cannot be written; nothing is left of it then.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        _fill(path, temporary, write)
        if before_rename is not None:
            before_rename()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _fill(path: Path, temporary: Path, write: Callable[[Path], None]) -> None:
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    except OSError as error:
        # A full disk is reported without a name, and Arrow's words for it hold the code twice.
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def write_text(path: Path, text: str, *, before_rename: Callable[[], object] | None = None) -> None:
    """Write ``text`` as UTF-8, as ``write_atomically`` does."""
    write_atomically(path, lambda temporary: _write_text(temporary, text), before_rename=before_rename)


def read_json(path: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    """The JSON object in the file ``path``; ValueError, with the file's name, where it is none or lacks ``keys``."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"[store] expected JSON, got {path}: {error}") from error
    if not isinstance(found, dict) or not set(keys) <= found.keys():
        raise ValueError(f"[store] expected a JSON object with {list(keys)}, got {path}: it is damaged or another's")
    return found


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    # The rename itself is durable only once the folder is.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock_folder(folder: Path) -> Callable[[], None]:
    """Lock ``folder`` against other processes; returns what unlocks it. The end of the process unlocks it too.

    Raises FileExistsError if another run holds it. File systems without locks are taken as free.
    """
    if os.name != "posix":
        return lambda: None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            os.close(descriptor)
            raise FileExistsError(f"[out] another run is writing into {folder}") from None
    return lambda: os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 by absolute path: of every file, and for a folder of each file directly inside it."""
    files: list[Path] = []
    for path in paths:
        files += sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    return {str(file.absolute()): sha256_of_file(file) for file in files}

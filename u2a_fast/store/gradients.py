"""A matrix of projected gradients on disk: shards of rows, each one whole file, under a manifest that says of what."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from u2a_fast.store.files import lock_folder, write_atomically, write_text

__all__ = ["GradientShards"]

MANIFEST = "manifest.json"


class GradientShards:
    """(rows, width) float32 in ``folder``, ``shard_rows`` rows a file, read through memory maps.

    Args:
        folder: its ``manifest.json`` holds ``manifest``: rows, width, shard_rows and whatever determines the entries.

    Raises:
        FileNotFoundError: there is no index, or an unfinished one.
        ValueError: its manifest is not one.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"[index] no such file: {path}")
        self.manifest: dict[str, Any] = _read_manifest(path)
        if missing := [key for key in ("rows", "width", "shard_rows") if key not in self.manifest]:
            raise ValueError(f"[index] expected the manifest of an index, got {path} without {missing}")
        if absent := [path for path, _ in _plan(self.folder, self.manifest) if not path.exists()]:
            raise FileNotFoundError(f"[index] unfinished: {absent[0]} is missing; build it again to go on")

    @classmethod
    def fill(
        cls,
        folder: Path | str,
        manifest: Mapping[str, Any],
        compute: Callable[[range], np.ndarray],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> "GradientShards":
        """Write every shard that is not there yet, ``compute(rows)`` giving its (len(rows), width) entries.

        ``on_progress(done, total)`` is called with rows, at the start and after every shard.

        Raises:
            FileExistsError: the folder holds an index of something else, or another run is writing into it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        unlock = lock_folder(folder)
        try:
            _claim(folder, dict(manifest))
            missing = [(path, rows) for path, rows in _plan(folder, manifest) if not path.exists()]
            done = manifest["rows"] - sum(len(rows) for _, rows in missing)
            report = on_progress or (lambda done, total: None)
            report(done, manifest["rows"])
            for path, rows in missing:
                values = np.ascontiguousarray(compute(rows), dtype=np.float32)
                assert values.shape == (len(rows), manifest["width"])
                write_atomically(path, partial(_save, values))
                done += len(rows)
                report(done, manifest["rows"])
        finally:
            unlock()
        return cls(folder)

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    def shards(self) -> Iterator[np.ndarray]:
        """The shards in the rows' order, memory-mapped, read-only; ValueError for a file that is no such shard."""
        for path, rows in _plan(self.folder, self.manifest):
            wanted = (len(rows), self.manifest["width"])
            try:
                found = np.load(path, mmap_mode="r")
            except (ValueError, EOFError) as error:
                raise ValueError(f"[index] expected a shard of shape {wanted}, got {path}: {error}") from error
            if found.shape != wanted or found.dtype != np.float32:
                raise ValueError(
                    f"[index] expected a float32 shard of shape {wanted}, got {path}: {found.dtype}, {found.shape}"
                )
            yield found

    def nonfinite_rows(self) -> int:
        """How many rows hold a NaN or infinity; reads all of them."""
        return sum(int((~np.isfinite(shard).all(axis=1)).sum()) for shard in self.shards())

    def product(self, vector: np.ndarray) -> np.ndarray:
        """The matrix times ``vector`` (width), (rows) float32."""
        parts = [shard @ vector.astype(np.float32) for shard in self.shards()]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def _plan(folder: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[Path, range]]:
    rows, step = manifest["rows"], manifest["shard_rows"]
    for i, start in enumerate(range(0, rows, step)):
        yield folder / f"shard-{i:06d}.npy", range(start, min(start + step, rows))


def _claim(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / MANIFEST
    if not path.exists():
        write_text(path, json.dumps(manifest, indent=2) + "\n")
        return
    stored = _read_manifest(path)
    if changed := sorted(key for key in {*stored, *manifest} if stored.get(key) != manifest.get(key)):
        raise FileExistsError(f"[index] {folder} holds an index of another {', '.join(changed)}: choose another folder")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"[index] expected JSON, got {path}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"[index] expected the manifest of an index, got {path} with a {type(found).__name__}")
    return found


def _save(values: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:  # given a path, NumPy would append its own suffix
        np.save(file, values)

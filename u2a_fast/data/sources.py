"""Where rows come from: JSON Lines, Parquet, Hugging Face datasets, or a sequence in memory.

A source can be iterated any number of times and never holds more than a batch of rows. It yields ``RawRow``s: the
row's place and either its columns or the reason why it could not be read.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["RawRow", "Source", "open_source"]

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet", ".pq")
PARQUET_BATCH = 256


class RawRow(NamedTuple):
    """A row before any check: ``columns`` or, where it could not be read, ``problem``."""

    line: int
    columns: Mapping[str, Any] | None
    problem: str | None = None


class Source(Protocol):
    """A named, re-iterable stream of raw rows; ``files`` are the local files it reads (for hashes)."""

    @property
    def name(self) -> str: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    def __iter__(self) -> Iterator[RawRow]: ...


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line, UTF-8; blank lines are passed over."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def __iter__(self) -> Iterator[RawRow]:
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if number == 1 and text.lstrip().startswith(b"["):
                    raise ValueError(f"[data] expected JSON Lines (an object a line), got a JSON array: {self.path}")
                if text.strip():
                    yield self._parse(number, text)

    def _parse(self, number: int, text: bytes) -> RawRow:
        try:
            value = json.loads(text.decode("utf-8"))
        except UnicodeDecodeError as error:
            return RawRow(number, None, f"not UTF-8: {error.reason} at byte {error.start}")
        except json.JSONDecodeError as error:
            return RawRow(number, None, f"invalid JSON: {error.msg} at column {error.colno}")
        except RecursionError:
            return RawRow(number, None, "invalid JSON: nested too deeply")
        if not isinstance(value, dict):
            return RawRow(number, None, f"expected a JSON object, got {type(value).__name__}")
        return RawRow(number, value)


@dataclass(frozen=True)
class ParquetFile:
    """A Parquet file, read a small batch at a time; ``line`` is the row number from 1."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def __iter__(self) -> Iterator[RawRow]:
        number = 0
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                    for columns in batch.to_pylist():
                        number += 1
                        yield RawRow(number, columns)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"[data] expected a Parquet file, got {self.path}: {error}") from error


@dataclass(frozen=True)
class Rows:
    """Any re-iterable collection of mappings: a list, a datasets.Dataset, a datasets.IterableDataset."""

    rows: Iterable[Mapping[str, Any]]
    name: str
    files: tuple[Path, ...] = ()

    def __iter__(self) -> Iterator[RawRow]:
        for number, columns in enumerate(self.rows, start=1):
            if isinstance(columns, Mapping):
                yield RawRow(number, columns)
            else:
                yield RawRow(number, None, f"expected a mapping, got {type(columns).__name__}")


def open_source(source: Any, *, split: str | None = None, streaming: bool = False) -> Source:
    """Find out what ``source`` is and give its rows.

    source: path of a JSON Lines (.jsonl, .ndjson, .json) or Parquet (.parquet, .pq) file; folder written by
    ``datasets.Dataset.save_to_disk``; hub name "owner/name"; or a re-iterable collection of mappings.
    Raises FileNotFoundError where nothing of the name exists, ValueError where it exists and is none of these.
    """
    if not isinstance(source, (str, Path)):
        return _in_memory(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _saved_dataset(path, split)
    if path.is_file():
        return _file(path, split)
    if path.exists():
        raise ValueError(f"[data] expected a regular file or a folder, got {path}")
    if _looks_like_hub_name(str(source)):
        return _hub_dataset(str(source), split, streaming)
    raise FileNotFoundError(f"[data] no such file or folder: {path} (looked for {path.absolute()})")


def _in_memory(source: Any) -> Rows:
    if isinstance(source, Iterator) or not isinstance(source, Iterable):
        raise TypeError(
            f"[data] expected a path, a hub name or a re-iterable collection of rows, got {type(source).__name__}"
        )
    return Rows(source, name="rows")


def _file(path: Path, split: str | None) -> Source:
    if split is not None:
        raise ValueError(f"[data] split {split!r} has no meaning for the file {path}: only datasets have splits")
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES:
        return JsonLines(path)
    if suffix in PARQUET_SUFFIXES:
        return ParquetFile(path)
    raise ValueError(
        f"[data] expected a file ending in {', '.join(JSON_SUFFIXES + PARQUET_SUFFIXES)} "
        f"or a folder written by save_to_disk, got {path}"
    )


def _looks_like_hub_name(name: str) -> bool:
    known_suffix = name.lower().endswith(JSON_SUFFIXES + PARQUET_SUFFIXES)
    return not known_suffix and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def _import_datasets() -> Any:
    # The only optional dependency of the readers: files need none of it.
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "[data] reading a saved dataset or a hub name needs the package `datasets` (pip install datasets); "
            "JSON Lines and Parquet files do not"
        ) from error
    return datasets


def _saved_dataset(path: Path, split: str | None) -> Rows:
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        raise ValueError(
            f"[data] expected a file or a folder written by datasets' save_to_disk, got the folder {path} "
            "without state.json or dataset_dict.json"
        )
    loaded = _import_datasets().load_from_disk(str(path))
    rows = _choose_split(loaded, split, str(path))
    return Rows(rows, name=str(path), files=tuple(sorted(file for file in path.rglob("*") if file.is_file())))


def _hub_dataset(name: str, split: str | None, streaming: bool) -> Rows:
    datasets = _import_datasets()
    try:
        loaded = datasets.load_dataset(name, split=split, streaming=streaming)
    except Exception as error:
        # Hub clients raise dozens of unrelated kinds (HTTP, offline mode, missing revision, builder): all end here.
        raise ValueError(
            f"[data] {name!r} is no local file or folder and could not be loaded from the hub: "
            f"{type(error).__name__}: {error}"
        ) from error
    return Rows(_choose_split(loaded, split, name), name=name)


def _choose_split(loaded: Any, split: str | None, name: str) -> Any:
    """``loaded`` is one dataset, or a mapping of split names to datasets."""
    if not isinstance(loaded, Mapping):
        return loaded
    found = list(loaded)
    if split is None and len(found) == 1:
        return loaded[found[0]]
    if split not in loaded:
        raise ValueError(f"[data] expected split to be one of {found} of {name}, got {split!r}")
    return loaded[split]

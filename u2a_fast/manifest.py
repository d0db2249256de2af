"""run.yaml: what made a result, beside it, in a form that the same command takes back with --config."""

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from u2a_fast.store.files import write_text

__all__ = ["RunRecord", "read_options", "read_record", "recorded_command", "versions"]

PACKAGES = ("u2a_fast", "torch", "transformers", "triton", "datasets", "peft", "accelerate", "numpy", "pyarrow")


@dataclass
class RunRecord:
    """One run of one verb. ``start`` writes run.yaml, ``finish`` writes it again with the end and the outcome."""

    command: str
    options: Mapping[str, Any]
    out: Path
    device: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    started: str = ""
    finished: str | None = None

    @classmethod
    def start(
        cls, command: str, options: Mapping[str, Any], out: Path, *, device: str, hashes: Mapping[str, str]
    ) -> "RunRecord":
        """Write ``out/run.yaml`` without an end; ``hashes`` are the SHA-256 of the input files by path."""
        record = cls(command, options, out, device, hashes, started=_now())
        out.mkdir(parents=True, exist_ok=True)
        record.write()
        return record

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the end of the run and its outcome."""
        self.result = result
        self.finished = _now()
        self.write()

    def write(self) -> None:
        """Write ``out/run.yaml`` as things stand."""
        content = {
            "command": self.command,
            "options": _plain(self.options),
            "started": self.started,
            "finished": self.finished,
            "device": self.device,
            "git_commit": _git_commit(),
            "versions": versions(),
            "inputs_sha256": dict(self.inputs),
            "result": _plain(self.result),
        }
        write_text(self.out / "run.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def read_options(path: Path, command: str) -> dict[str, Any]:
    """The options of a run.yaml, or of a YAML file that holds options alone; for ``command`` only.

    Raises ValueError if the file is no such YAML or was written by another command.
    """
    if not path.is_file():
        raise FileNotFoundError(f"[config] no such file: {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"[config] {path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"[config] expected a mapping of options in {path}, got {type(content).__name__}")
    if "options" not in content:
        return content
    if content.get("command", command) != command:
        raise ValueError(f"[config] {path} is a run of {content['command']!r}, expected one of {command!r}")
    if not isinstance(content["options"], dict):
        raise ValueError(f"[config] expected a mapping under 'options' in {path}")
    return content["options"]


def recorded_command(path: Path) -> str | None:
    """The verb that wrote the run.yaml ``path``; None where there is none, or it is none of ours."""
    return read_record(path).get("command")


def read_record(path: Path) -> dict[str, Any]:
    """All that the run.yaml ``path`` says; empty where there is none, or it is none of ours."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that results depend on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["torch"] = str(torch.__version__)  # with its build tag, e.g. +cpu
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with "+changes" where it differs; None outside one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    return commit and commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _plain(value: Any) -> Any:
    """The value in YAML's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)

"""What a result was measured on and with: enough to repeat it, nothing that names a person's computer."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from u2a_fast.manifest import versions

__all__ = ["ROOT", "commit", "describe", "has_cpu_flag", "slug"]

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ("u2a_fast", "csrc", "kernels", "benchmarks/*.py", "setup.py")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    pairs = [line.partition(":") for line in lines if ":" in line]
    return {key.strip(): value.strip() for key, _, value in reversed(pairs)}


def has_cpu_flag(flag: str) -> bool:
    """Whether Linux lists the instruction set ``flag`` for this CPU."""
    return flag in _cpuinfo().get("flags", "").split()


def commit() -> str:
    """The commit of the checkout that this package runs from, "+changes" where code that is measured differs from it.

    Outside of a checkout (a copy on a GPU machine, an installed package) it is what the environment variable
    BENCH_COMMIT says, else "unknown".
    """
    if not (ROOT / ".git").exists():  # git would search the folders above, which may be a checkout of something else
        return os.environ.get("BENCH_COMMIT", "unknown")
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED) else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCH_COMMIT", "unknown")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def describe(device: str) -> dict[str, Any]:
    """Machine, threads, versions, commit and command of a row measured on ``device`` ("cpu" or "cuda")."""
    cpu = _cpuinfo().get("model name", platform.processor() or platform.machine())
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "machine": gpu or f"{cpu}, {os.cpu_count()} cores",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "cpu_flags": [flag for flag in FLAGS if has_cpu_flag(flag)],
        "gpu": gpu,
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {name: found for name, found in versions().items() if found is not None},
        "commit": commit(),
        "command": command(sys.argv),
    }


def command(argv: list[str]) -> str:
    """The command line as one would type it: a module of the checkout by its name, no folders of absolute paths."""
    program = Path(argv[0]).resolve()
    name = program.name
    if program.suffix == ".py" and ROOT in program.parents:
        name = "python -m " + ".".join(program.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    return " ".join([name, *(Path(word).name if Path(word).is_absolute() else word for word in argv[1:])])


def slug(name: str) -> str:
    """``name`` as a file name: lower case, one dash for anything but letters and digits."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())

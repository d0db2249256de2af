"""Throw-away environments, one a peer, which borrow torch and transformers from the interpreter that makes them.

    python -m benchmarks.peers.environments [--folder build/peers] [--only bergson,captum] [--wheels FOLDER]

What a peer pins is installed beside it without its dependencies; torch, transformers and whatever else the running
environment has are seen through a path file, so every peer computes with the very same libraries. Pip's own resolver
would bring torchvision and torchaudio builds that do not fit a CPU torch. Without a network, --wheels names a folder of
wheels that everything is installed from. A peer that does not install leaves its error
behind, which becomes its row.
"""

import argparse
import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/peers/environments.py`

from benchmarks import ROOT

__all__ = ["FOLDER", "PACKAGES", "Environment", "main", "prepare", "public_error"]

FOLDER = ROOT / "build" / "peers"
BERGSON = ("jaxtyping==0.3.7", "wadler-lindig==0.1.7", "ml_dtypes==0.6.0", "natsort==8.4.0", "petname==2.9")
PARSING = ("simple-parsing==0.1.9", "docstring-parser==0.18.0")
DATASETS = ("datasets", "dill", "multiprocess")  # u2a_fast's own, but not on every GPU machine
PACKAGES: dict[str, tuple[str, ...]] = {
    "bergson": ("bergson==2.5.1", *BERGSON, *PARSING, "torchopt==0.7.3", "optree==0.20.0", *DATASETS, "scipy"),
    "captum": ("captum==0.9.0",),
    "dattri": ("dattri==0.3.0", "scipy"),
    "kronfluence": ("kronfluence==1.0.1", "einops==0.8.2", "einconv==0.1.0", "opt-einsum==3.4.0"),
    "opacus": ("opacus==1.6.0", "opt-einsum==3.4.0", "scipy"),
    "traker": ("traker==0.3.2",),
    "logix": ("logix-ai==0.1.1",),
    "fast_jl": ("fast_jl==0.1.3",),
    "sjlt": ("sjlt==0.1.7",),
}
SECONDS = 300


@dataclass(frozen=True)
class Environment:
    """An interpreter to run a peer with, or why there is none."""

    python: str
    error: str | None = None


def public_error(text: str) -> str:
    """The line of ``text`` that says what went wrong, without paths and addresses of this machine."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    telling = [line for line in lines if re.match(r"(ERROR|[\w.]*(Error|Exception))\b", line)] or lines
    line = re.sub(r"\w+://\S+|(?<!\w)/[\w.+@~-]+(?:/[^\s:'\"]*)+", "...", telling[-1])
    return line[:300]


def prepare(name: str, folder: Path = FOLDER, wheels: Path | None = None) -> Environment:
    """The environment ``name`` of PACKAGES below ``folder``, made if it is not there yet; the running one for "".

    With ``wheels`` everything is installed from that folder and nothing from the network.
    """
    if not name:
        return Environment(sys.executable)
    home = folder / "environments" / name
    record = home / "environment.json"
    wanted = {"packages": list(PACKAGES[name]), "lender": sysconfig.get_path("purelib"), "offline": wheels is not None}
    if record.exists():
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["wanted"] == wanted:
            return Environment(**found["environment"])
    environment = _make(home, PACKAGES[name], wheels)
    record.write_text(json.dumps({"wanted": wanted, "environment": asdict(environment)}), encoding="utf-8")
    return environment


def _make(home: Path, packages: Sequence[str], wheels: Path | None) -> Environment:
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    lender = sysconfig.get_path("purelib")
    (home / "lib" / version / "site-packages" / "lender.pth").write_text(f"{lender}\n", encoding="utf-8")
    # Packages that import torch to be built find it only without build isolation.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    source = ["--no-index", "--find-links", str(wheels)] if wheels is not None else []
    install = [*pip, "install", "--quiet", "--no-deps", "--no-build-isolation", *source, *packages]
    try:
        done = subprocess.run(install, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Environment(str(python), f"not installed after {SECONDS} s")
    return Environment(str(python), public_error(done.stderr) if done.returncode else None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--wheels", type=Path, help="install from this folder, and nothing from the network")
    options = parser.parse_args(argv)
    for name in options.only.split(",") if options.only else PACKAGES:
        error = prepare(name, options.folder, options.wheels).error
        print(f"{name}: {'ready' if error is None else error}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

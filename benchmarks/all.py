"""Every CPU measurement on one thread, about 25 minutes, into the committed rows and the tables.

    python -m benchmarks.all

Nothing else should run meanwhile. Each benchmark has a process of its own; the exit status is 1 if a gate failed.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/all.py`

from benchmarks import ROOT, tables
from benchmarks.rows import results_file
from u2a_fast.bench.machine import describe

BENCHMARKS = ("routes", "score", "memory", "modes", "crossover", "run")


def main() -> int:
    """Run all; 1 if any of them failed."""
    out = results_file(describe("cpu"))
    # Thread counts are fixed before torch starts: some libraries read them only then.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    failed = []
    for name in BENCHMARKS:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(out)]
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0:
            failed.append(name)
    tables.main([])
    print(f"rows: {out.relative_to(ROOT)}; {'gates failed in ' + ', '.join(failed) if failed else 'all gates green'}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())

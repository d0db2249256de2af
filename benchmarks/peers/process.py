"""A contestant's process as its parent sees it."""

import json
import os
import select
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.peers.contestants import Contestant
from benchmarks.peers.environments import public_error

__all__ = ["Worker", "WorkerError"]


class WorkerError(RuntimeError):
    """A contestant failed, or took too long; the message names no path."""


class Worker:
    """Starts ``benchmarks.peers.worker`` with ``python``, which imports, and talks to it line by line.

    Args:
        contestant: whose adapter is run.
        python: the interpreter of its environment.
        folder: the task's.
        log: the file for what the process prints.
        threads: CPU threads it may use.
        patience: seconds that an answer may take.
    """

    def __init__(
        self, contestant: Contestant, python: str, folder: Path, log: Path, *, threads: int, patience: float
    ) -> None:
        self.patience = patience
        command = [python, "-m", "benchmarks.peers.worker", str(folder), contestant.adapter, contestant.mode]
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        environment = {**os.environ, **counts, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        with log.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [*command, str(threads)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self.log = log

    def load(self) -> float:
        """Have it load the task and set up; the seconds that setting up took. WorkerError with what went wrong."""
        seconds: float = self._ask("load")["setup_seconds"]
        return seconds

    def run(self, count: int) -> dict[str, Any]:
        """Score the first ``count`` examples. WorkerError with what went wrong."""
        return self._ask(f"run {count}")

    def _ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died, with an answer or without: either is there to read
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], self.patience)[0]:
            self.process.kill()
            raise WorkerError(f"no answer within {self.patience:.3g} s")
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(public_error(answer["error"]))
        return answer

    def _last_words(self) -> str:
        self.process.wait(10)
        return f"died with status {self.process.returncode}: {public_error(self.log.read_text(encoding='utf-8'))}"

    def close(self) -> None:
        """End the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what a dead process was not told
                pipe.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

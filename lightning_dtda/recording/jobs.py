"""Many seeded runs in parallel processes, each an ordinary ``lightning-dtda record`` of a few seeds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_dtda.recording.recorder import run_name
from lightning_dtda.recording.seeds import is_complete

_POLL_SECONDS = 0.5
_TAIL_LINES = 12
"""Lines of a failed job's log that are shown: the end of a traceback."""


def record_in_jobs(
    command: Sequence[str], root: Path, seeds: Sequence[int], jobs: int, finished: Callable[[int], None]
) -> dict[int, str]:
    """Share seeds out to processes and wait for them.

    Args:
        command: Arguments of ``lightning-dtda`` that record into ``root``; ``--seeds`` and what is to
            fit on the disk are added.
        root: The ensemble's directory; each job's output goes to ``root/logs/job-0.log`` and so on.
        seeds: The seeds that are to be trained.
        jobs: Number of processes.
        finished: Called with each seed whose run is complete.

    Returns:
        What went wrong, by seed.
    """
    logs = root / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    # two thread pools on the same cores are many times slower than one thread each
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    processes = []
    for job in range(min(jobs, len(seeds))):
        arguments = [*command, f"--seeds={list(seeds[job::jobs])}", f"--runs_to_fit={len(seeds)}"]
        with (logs / f"job-{job}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "lightning_dtda", *arguments],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        processes.append(process)
    waiting = set(seeds)
    # asked to end, Python would end at once and leave the trainings running
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting:
            running = any(process.poll() is None for process in processes)
            for seed in sorted(waiting):
                if is_complete(root / run_name(seed)):
                    waiting.discard(seed)
                    finished(seed)
            if not running:
                break
            time.sleep(_POLL_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in processes:
            if process.poll() is None and waiting:
                process.terminate()
        for process in processes:
            process.wait()
    return {seed: _reason(logs / f"job-{list(seeds).index(seed) % jobs}.log") for seed in sorted(waiting)}


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _reason(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return f"see {log}, which ends:\n    " + "\n    ".join(lines[-_TAIL_LINES:])

"""Programs whose processes are the ranks of one gloo group, as tests start them and wait for them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist


class Ended(NamedTuple):
    code: int  # negative: by that signal
    text: str  # what it wrote, errors among it
    seconds: float  # until it ended, from the start of all


def run(module: str, count: int, folder: Path, *arguments: str, timeout: float = 300.0) -> list[Ended]:
    """Runs `python -m module folder arguments` as each of `count` ranks; `joined` makes them a group.

    Raises:
        AssertionError: a rank has not ended in time; says what each had written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begun, found = time.monotonic(), []
    processes, files = [], []
    for rank in range(count):
        files.append(open(folder / f"rank-{rank}.txt", "w+"))
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", module, str(folder), *arguments]
        processes.append(subprocess.Popen(command, env=environment, stdout=files[-1], stderr=subprocess.STDOUT))
    ended: dict[int, float] = {}
    try:
        while len(ended) < count and time.monotonic() < begun + timeout:
            for rank, process in enumerate(processes):
                if rank not in ended and process.poll() is not None:
                    ended[rank] = time.monotonic() - begun
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, (process, file) in enumerate(zip(processes, files, strict=True)):
        file.seek(0)
        found.append(Ended(process.returncode, file.read(), ended.get(rank, timeout)))
        file.close()
    written = "\n".join(f"rank {rank}:\n{one.text[-3000:]}" for rank, one in enumerate(found))
    assert len(ended) == count, f"ranks {sorted(set(range(count)) - set(ended))} did not end\n{written}"
    return found


def succeed(module: str, count: int, folder: Path, *arguments: str, timeout: float = 300.0) -> None:
    """The same, of ranks that must all end well."""
    found = run(module, count, folder, *arguments, timeout=timeout)
    written = "\n".join(f"rank {rank} ended with {one.code}:\n{one.text[-3000:]}" for rank, one in enumerate(found))
    assert all(one.code == 0 for one in found), written


def joined(folder: Path) -> tuple[int, int]:
    """This rank and how many there are, once they are a group."""
    torch.set_num_threads(1)
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    return rank, count

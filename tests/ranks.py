"""Programs whose processes are the ranks of one group, as tests start them and wait for them.

Each process is a fork of a server that has the libraries loaded (preloaded.py), which a test process starts once: to
import torch, transformers and DeepSpeed again takes 15 seconds of a core, more than what most of the programs do.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.run


class Ended(NamedTuple):
    code: int  # negative: by that signal
    text: str  # what it wrote, errors among it
    seconds: float  # until it ended, from the start of all


def run(module: str, count: int, folder: Path, *arguments: str, timeout: float = 300.0) -> list[Ended]:
    """Runs `python -m module folder arguments` as each of `count` ranks; `joined` makes them a group.

    Raises:
        AssertionError: a rank has not ended in time; says what each had written.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    of_all = {**address, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    environments = [{**of_all, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return _ended(_as_main, module, environments, folder, [str(folder), *arguments], timeout)


def succeed(module: str, count: int, folder: Path, *arguments: str, timeout: float = 300.0) -> None:
    """The same, of ranks that must all end well."""
    found = run(module, count, folder, *arguments, timeout=timeout)
    written = "\n".join(f"rank {rank} ended with {one.code}:\n{one.text[-3000:]}" for rank, one in enumerate(found))
    assert all(one.code == 0 for one in found), written


def launched(launcher: str, folder: Path, *arguments: str, timeout: float = 300.0) -> Ended:
    """Runs `python -m launcher arguments`, torchrun or accelerate's, whose processes are forks too.

    Args:
        launcher: the module, which starts processes by torch.distributed.run.
        folder: for what they write.
        arguments: `-m module` among them.
    """
    (found,) = _ended(_as_launcher, launcher, [{}], folder, list(arguments), timeout)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def joined(folder: Path) -> tuple[int, int]:
    """This rank and how many there are, once they are a group."""
    torch.set_num_threads(1)
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    return rank, count


def server_of_forks():
    """The context of multiprocessing whose processes are its forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def _ended(start, module, environments, folder, arguments, timeout):
    """How a process of each environment ended, in at most so many seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    context = server_of_forks()
    files = [folder / f"rank-{rank}.txt" for rank in range(len(environments))]
    processes = [
        context.Process(target=_run, args=(start, module, arguments, environment, file))
        for environment, file in zip(environments, files, strict=True)
    ]
    begun = time.monotonic()
    ended: dict[int, float] = {}
    try:
        for process in processes:
            process.start()
        while len(ended) < len(processes) and time.monotonic() < begun + timeout:
            for rank, process in enumerate(processes):
                if rank not in ended and not process.is_alive():
                    ended[rank] = time.monotonic() - begun
            time.sleep(0.02)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    found = [
        Ended(process.exitcode, file.read_text(), ended.get(rank, timeout))
        for rank, (process, file) in enumerate(zip(processes, files, strict=True))
    ]
    written = "\n".join(f"rank {rank}:\n{one.text[-3000:]}" for rank, one in enumerate(found))
    assert len(ended) == len(found), f"ranks {sorted(set(range(len(found))) - set(ended))} did not end\n{written}"
    return found


def _run(start, module, arguments, environment, file):
    """A fork's life."""
    os.environ |= environment
    with open(file, "w") as written:
        os.dup2(written.fileno(), 1)
        os.dup2(written.fileno(), 2)
    start(module, arguments)


def _as_main(module, arguments):
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _as_launcher(module, arguments):
    sys.argv = [module, *arguments]
    torch.distributed.run.run = _run_forks
    importlib.import_module(module).main()


def _run_forks(arguments):
    """torch.distributed.run.run, whose agent forks the processes of a module and starts no interpreter for each."""
    if arguments.standalone:
        arguments.rdzv_backend, arguments.rdzv_endpoint, arguments.rdzv_id = "c10d", "localhost:0", "forks"
    config, _, _ = torch.distributed.run.config_from_args(arguments)
    config.start_method = "fork"
    elastic = torch.distributed.run.elastic_launch(config=config, entrypoint=_launched)
    elastic(arguments.training_script, arguments.training_script_args)


def _launched(module, arguments):
    try:
        _as_main(module, arguments)
    except BaseException:
        traceback.print_exc()  # as an interpreter would, before the agent ends the others
        raise

"""Connections by which each process of a run learns within a second that another has failed, and why.

What a process waits for in a collective it may wait for half an hour, and then it is told that some connection is gone.
So all have a connection to the first besides, over which one that fails says why. The end of a connection, which the
kernel closes, tells of one that was killed; keepalives of the kernel tell of a machine that is gone, in half a minute.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object

from dam.train.processes import is_shared

_CONNECT = 10.0  # seconds to connect in
_TOLD_LATE = 5.0  # by which the cause may come later than what it has caused
_LEAVE = 15.0  # for which a process that has ended waits for the others to end, and say why
_END = 20.0  # after the cause: a process that has not ended by itself is made to
_SILENT = "it stopped without a word: it was killed, as where memory runs out, or its machine is gone"


class OtherProcessError(RuntimeError):
    """Another process of the run has failed; the message says which and why."""


class Lifelines:
    """Of this process; `begin` is called by all, and `close` by each.

    Where training runs in the main thread, that is interrupted when another process fails, by SIGTERM: so it is too
    where a launcher ends the processes that are left, and what is raised says why.
    """

    def __init__(self) -> None:
        self._state = PartialState()
        self._lock = threading.RLock()
        self._known = threading.Event()  # the cause is
        self._all_left = threading.Event()
        self._cause: tuple[int, str] | None = None
        self._ending = self._closed = False
        self._left: set[int] = set()  # of the first process: those that have ended, or are gone
        self._lines: dict[int, socket.socket] = {}
        self._main: int | None = None  # the thread that trains, where it can be interrupted
        self._previous: Any = None

    # Begin and end

    def begin(self) -> None:
        """Connects all processes.

        Raises:
            RuntimeError: another has ended before the run began.
        """
        if self._state.num_processes == 1:
            return
        try:
            connected = self._serve() if self._state.process_index == 0 else self._connect()
        except RuntimeError as error:
            raise RuntimeError(
                "another process ended before the run began, or is not to be reached: its own message says why"
            ) from error
        if not connected:
            warnings.warn(
                "no connection to the first process: of one that fails this one learns by the timeout of collectives",
                stacklevel=2,
            )
        if threading.current_thread() is threading.main_thread():
            self._main = threading.get_ident()
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        threading.Thread(target=self._watch, daemon=True, name="dam lifelines").start()

    def _serve(self) -> bool:
        token, others = secrets.token_hex(16), self._state.num_processes - 1
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", 0), family=family, backlog=others, dualstack_ipv6=dual) as server:
            hosts = [os.environ.get("MASTER_ADDR", "127.0.0.1"), socket.gethostname()]
            _from_first([hosts, server.getsockname()[1], token])
            waiting = threading.Thread(target=self._accept, args=(server, token, others), daemon=True)
            waiting.start()
            reached = sum(gather_object([0]))
            waiting.join(_CONNECT if reached == others else 0.0)
        return len(self._lines) == others

    def _accept(self, server: socket.socket, token: str, others: int) -> None:
        server.settimeout(2 * _CONNECT)
        while len(self._lines) < others:
            try:
                line, _ = server.accept()
                line.settimeout(_CONNECT)
                said = json.loads(line.recv(1024))
            except (OSError, ValueError):
                if server.fileno() < 0:
                    return
                continue
            if said.get("token") == token:
                self._lines[said["process"]] = _kept_alive(line)

    def _connect(self) -> bool:
        hosts, port, token = _from_first([None, None, None])
        for host in dict.fromkeys(hosts):
            try:
                line = socket.create_connection((host, port), timeout=_CONNECT)
                line.sendall(json.dumps({"token": token, "process": self._state.process_index}).encode())
            except OSError:
                continue
            self._lines[0] = _kept_alive(line)
            break
        gather_object([len(self._lines)])
        return len(self._lines) > 0

    def close(self) -> None:
        """Ends what `begin` began: this process needs the others no more, nor they it."""
        self._send({"says": "done"})
        with self._lock:
            self._closed = True
            if self._main is not None:
                signal.signal(signal.SIGTERM, self._previous)
                self._main = None
        for line in self._lines.values():
            line.close()

    # Failure

    def failure(self, error: BaseException) -> BaseException:
        """What ends this process, once `error` was raised here: that, or the failure of another that has caused it.

        The others are told, unless they raise it too (`dam.train.processes.is_shared`).
        """
        with self._lock:
            self._ending = True  # SIGTERM is what is happening already
        if is_shared(error):
            return error
        if not isinstance(error, OtherProcessError) and self._cause is None and _is_of_communication(error):
            self._known.wait(_TOLD_LATE)
        if self._cause is None:
            self._told(self._state.process_index, f"{type(error).__name__}: {error}")
        assert self._cause is not None
        process, why = self._cause
        if process == self._state.process_index or isinstance(error, OtherProcessError):
            return error
        other = OtherProcessError(f"process {process} failed: {why}")
        other.__cause__ = error
        return other

    def leave(self, failure: BaseException) -> None:
        """Says why this process ends, and waits for the others to have said so: a launcher ends all once one is gone.

        Before, its collectives are broken off, for which others may wait.
        """
        if self._state.num_processes == 1:
            return
        print(f"process {self._state.process_index} ends: {failure}", file=sys.stderr, flush=True)
        _break_off()
        if self._state.process_index == 0:
            self._have_left(0)
        else:
            self._send({"says": "left"})
        if self._lines:
            self._all_left.wait(_LEAVE)

    def _told(self, process: int, why: str) -> None:
        """The first failure that is told of; the first process tells all others."""
        with self._lock:
            if self._cause is not None:
                return
            self._cause = (process, why)
        self._known.set()
        self._send({"says": "failed", "process": process, "why": why})
        if process != self._state.process_index:
            threading.Thread(target=self._end_here, daemon=True).start()

    def _end_here(self) -> None:
        """Interrupts what the process does, again until it ends, and ends it where it does not."""
        end = time.monotonic() + _END
        while time.monotonic() < end:
            with self._lock:
                if self._ending or self._closed:
                    return
                if self._main is not None and callable(signal.getsignal(signal.SIGTERM)):
                    signal.pthread_kill(self._main, signal.SIGTERM)
            time.sleep(1.0)
        assert self._cause is not None
        process, why = self._cause
        print(
            f"process {self._state.process_index} ends, in the midst of what it did: process {process} failed: {why}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._ending:
            return
        if not self._known.wait(2.0):  # of no other process: it is for this one
            signal.signal(signal.SIGTERM, self._previous)
            os.kill(os.getpid(), number)
            return
        assert self._cause is not None
        process, why = self._cause
        raise OtherProcessError(f"process {process} failed: {why}")

    # What is sent and heard

    def _send(self, message: dict[str, Any]) -> None:
        data = (json.dumps(message) + "\n").encode()
        with self._lock:
            for line in self._lines.values():
                try:
                    line.sendall(data)
                except OSError:  # gone: the thread that reads hears of it
                    continue

    def _watch(self) -> None:
        """Hears what others say, until no connection is left."""
        heard: dict[int, bytes] = {process: b"" for process in self._lines}
        done: set[int] = set()
        with selectors.DefaultSelector() as selector:
            for process, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, process)
            while selector.get_map() and not self._closed:
                for key, _ in selector.select(timeout=1.0):
                    process, line = key.data, self._lines[key.data]
                    data = _received(line)
                    if not data:
                        selector.unregister(line)
                        self._is_gone(process, process in done)
                        continue
                    *messages, heard[process] = (heard[process] + data).split(b"\n")
                    for message in map(json.loads, messages):
                        if message["says"] == "done":
                            done.add(process)
                        self._hear(process, message)

    def _hear(self, process: int, message: dict[str, Any]) -> None:
        says = message["says"]
        if says == "failed":
            self._told(message["process"], message["why"])
        elif says == "left":
            self._have_left(process)
        elif says == "all left":
            self._all_left.set()

    def _is_gone(self, process: int, done: bool) -> None:
        if self._closed:
            return
        if not done:
            self._told(process, _SILENT)
        if process == 0:
            self._all_left.set()  # nobody is left to say so
        else:
            self._have_left(process)

    def _have_left(self, process: int) -> None:
        """In the first process: whether all have, which it tells them."""
        with self._lock:
            self._left.add(process)
            all_left = self._left >= {0, *self._lines}
        if all_left:
            self._send({"says": "all left"})
            self._all_left.set()


def _from_first(given: list[Any]) -> list[Any]:
    """What the first process gives, on all."""
    dist.broadcast_object_list(given, src=0, device=_device())
    return given


def _device() -> Any:
    return PartialState().device


def _kept_alive(line: socket.socket) -> socket.socket:
    """Of which the kernels of both sides find out in half a minute that the other's machine is gone."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # not everywhere
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return line


def _received(line: socket.socket) -> bytes:
    try:
        return line.recv(65536)
    except OSError:
        return b""


def _is_of_communication(error: BaseException) -> bool:
    """Whether what a collective raises where another process is gone."""
    words = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "process group")
    of_torch = isinstance(error, (RuntimeError, ConnectionError))
    return isinstance(error, dist.DistError) or (of_torch and any(word in str(error).lower() for word in words))


def _break_off() -> None:
    """Ends this process's part in collectives, so that no other waits for it."""
    if not dist.is_initialized():
        return
    end: Callable[[], None] = dist.destroy_process_group
    if dist.get_backend() != "gloo":  # whose end would wait for what hangs
        end = getattr(dist.distributed_c10d, "_abort_process_group", end)
    try:
        end()
    except Exception as error:
        warnings.warn(f"the process group could not be ended: {type(error).__name__}: {error}", stacklevel=2)

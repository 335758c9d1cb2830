"""Worker processes for functions that may hang, crash, print or allocate without end: each call costs itself only.

Calls run in processes forked by a server process, which is started as a fresh interpreter: it has none of the threads
and none of the GPU memory of this one, holds the function ready with all that it imports, and makes a new worker in
milliseconds. A worker that has to be killed is killed with its children. This is no sandbox: a function can still
write files and reach the network, and memory is bounded for each process, not for all that a function starts.

For Linux and macOS; the latter has no bound of memory.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import gc
import io
import math
import numbers
import os
import pickle
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

KINDS = ("error", "timeout", "memory", "crash", "answer")

_LARGEST_ANSWER = 1 << 20  # bytes
_LONGEST_MESSAGE = 500  # characters
_START_SECONDS = 300.0  # for the imports of a function, once
_SERVER_SECONDS = 30.0  # for a fork, or the end of a worker
_CLOSE_SECONDS = 5.0

_SIZE = struct.Struct("<Q")  # stands in front of what is sent
_ORDER = struct.Struct("<cq")  # to the server: what to do, and to which process, or how many bytes come yet
_REPLY = struct.Struct("<q")  # of it: the process, or how it ended
_FORK, _END, _IMPORT = b"f", b"e", b"i"
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # of Linux's prctl
_SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("dam_workers", sys.argv[1])
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module._serve(int(sys.argv[2]))
"""
_NO_ANSWER = object()


class Failure(NamedTuple):
    """Stands for the answer of a call that gave none."""

    kind: str  # one of KINDS
    message: str


def is_worker() -> bool:
    """Whether this process is one of a pool's, whose calls have their limits already."""
    return "dam_workers" in sys.modules  # by _SCRIPT


class ServerError(RuntimeError):
    """The process that starts the workers cannot begin, or cannot fork: nothing that a call did."""


class _ServerGone(Exception):
    """The server ended, or does not reply."""


class Pool:
    """Calls a function in worker processes, side by side, each call with a limit of time and of memory.

    A call that fails is of kind "error" (the function raised), "timeout", "memory" (MemoryError: its limit is reached),
    "crash" (its process ended: os._exit, sys.exit, a signal, a fault) or "answer" (larger than 1 MiB, or more than
    plain data). What other calls did in the same worker counts for nothing: before a call is said to have crashed or to
    have run out of memory, it is made once more in a worker of its own. Threads and processes that it leaves behind end
    with it.

    The function is sent by pickle: by name, if it has one in a module that can be imported. One of the main script or a
    notebook, a lambda, and a function within another are sent as they are now by dill, where that is installed (it
    comes with `datasets`). What it changes, globals for one, is not seen here, nor by other workers; random numbers are
    drawn anew in each. Its module, and those of what arguments are, should start no threads when they are imported.

    What is printed is lost. Answers are plain data: None, truth values, numbers, text, bytes, and lists, tuples, dicts
    and sets of these; arrays and tensors come as lists, other numbers as float.

    Args:
        function: called as function(*arguments), or function(**arguments).
        workers: calls at once, each in a process.
        timeout: seconds that a call may take before it is killed; None is no limit.
        memory: bytes that a worker may have beyond what it begins with, the function and what arguments are made of
            once imported (RLIMIT_AS); None is no limit. CUDA asks for more address space than any.

    Raises:
        TypeError: the function cannot be sent.
        ValueError: a number is out of range.
        ServerError: the function cannot be loaded in a fresh interpreter.
        OSError: this system cannot fork.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        workers: int = 2,
        timeout: float | None,
        memory: int | None = 2 << 30,
    ):
        if workers < 1:
            raise ValueError(f"workers must be at least 1; got {workers}")
        for name, limit in (("timeout", timeout), ("memory", memory)):
            if limit is not None and not 0 < limit < math.inf:
                raise ValueError(f"{name} must be > 0 or None; got {limit}")
        if not hasattr(os, "fork"):
            raise OSError("worker processes need a system that forks: Linux or macOS")
        self._size, self._timeout = workers, timeout
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._idle: list[_Worker] = []
        path = [os.path.abspath(entry) for entry in sys.path]  # "" is the folder that this process is in now
        self._server = _Server(pickle.dumps({"path": path, "memory": memory, "function": _packed(function)}))
        self._closing = weakref.finalize(self, _close, self._owner, self._server)
        try:
            self._server.start()
        except BaseException:
            self._closing()
            raise

    def map(self, arguments: Sequence[tuple[Any, ...] | Mapping[str, Any]]) -> list[Any]:
        """What the function gives for each, in their order, or a `Failure` in its place.

        Args:
            arguments: of each call, a tuple, or a mapping of names.

        Raises:
            TypeError: arguments cannot be pickled.
            RuntimeError: the pool is closed.
            ServerError: no worker can be started.
        """
        with self._lock:
            if not self._closing.alive or os.getpid() != self._owner:
                raise RuntimeError("the pool is closed, or belongs to another process")
            calls = _Calls(self._server, self._idle, arguments, self._size, self._timeout)
            try:
                return calls.run()
            except BaseException:  # an interrupt may have come anywhere: nothing is kept
                calls.abandon()
                raise

    def close(self) -> None:
        """Ends all workers. Done too when the pool is collected, and when this process ends, however it does."""
        with self._lock:
            for worker in self._idle:
                worker.channel.close()
            self._idle.clear()
            self._closing()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(owner: int, server: _Server) -> None:
    if os.getpid() == owner:  # in a child by os.fork it is not the child's to end
        server.close()


class _Worker:
    """A worker, as the process of the pool sees it, and the call that it is at."""

    def __init__(self, process: int, channel: socket.socket, generation: int):
        self.process, self.channel = process, channel
        self.generation = generation  # of what the server had imported
        self.calls = 0
        self.number = -1  # of the call
        self.deadline = math.inf
        self._unsent = memoryview(b"")
        self._received = bytearray()

    def give(self, number: int, call: bytes, timeout: float | None) -> None:
        self.calls += 1
        self.number = number
        self.deadline = math.inf if timeout is None else time.monotonic() + timeout
        self._unsent = memoryview(_SIZE.pack(len(call)) + call)
        self._received.clear()

    def send(self) -> bool:
        """Sends what there is room for; whether that was all. One that is gone is found out when it is read from."""
        try:
            self._unsent = self._unsent[self.channel.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent = memoryview(b"")
        return not self._unsent

    def read(self) -> bool:
        """Takes what there is to read; whether the worker is still there."""
        try:
            part = self.channel.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._received += part
        return bool(part)

    def answer(self) -> bytes | None:
        """That of the call, once it is there."""
        if len(self._received) < _SIZE.size:
            return None
        size = _SIZE.unpack_from(self._received)[0]
        if size > 2 * _LARGEST_ANSWER:  # not by a worker's own doing
            return b""
        end = _SIZE.size + size
        return bytes(self._received[_SIZE.size : end]) if len(self._received) >= end else None


class _Calls:
    """The calls of one `Pool.map`.

    Args:
        server: forks and ends workers.
        idle: workers without a call; those that have none at the end are left here.
    """

    def __init__(
        self, server: _Server, idle: list[_Worker], arguments: Sequence[Any], size: int, timeout: float | None
    ):
        self._server, self._idle, self._arguments, self._size, self._timeout = server, idle, arguments, size, timeout
        self._answers: list[Any] = [_NO_ANSWER] * len(arguments)
        self._waiting = collections.deque(range(len(arguments)))
        self._suspects: collections.deque[int] = collections.deque()  # one of them ended the server: one at a time
        self._running: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def run(self) -> list[Any]:
        try:
            while self._waiting or self._suspects or self._running:
                try:
                    self._server.start()
                    self._step()
                except _ServerGone:
                    self._without_server()
        finally:
            self._selector.close()
        return self._answers

    def abandon(self) -> None:
        """Ends all workers, whatever they are at."""
        self._server.close()
        for worker in (*self._running, *self._idle):
            worker.channel.close()
        self._idle.clear()

    def _step(self) -> None:
        self._begin_calls()
        earliest = min(worker.deadline for worker in self._running)
        wait = None if earliest == math.inf else max(0.0, earliest - time.monotonic())
        for key, events in self._selector.select(wait):
            worker = key.data
            if events & selectors.EVENT_WRITE and worker.send():
                self._selector.modify(worker.channel, selectors.EVENT_READ, worker)
            if events & selectors.EVENT_READ:
                there = worker.read()
                answer = worker.answer()
                if answer is not None:
                    self._answered(worker, answer)
                elif not there:
                    self._crashed(worker)
        now = time.monotonic()
        for worker in [worker for worker in self._running if worker.deadline <= now]:
            self._fail(worker, "timeout", f"no answer within {self._timeout:g} seconds")

    def _begin_calls(self) -> None:
        if self._suspects:
            if not self._running:
                while self._idle:  # none that another call has touched
                    self._end(self._idle[-1])
                self._make(self._suspects)
            return
        while self._waiting and len(self._running) < self._size:
            self._make(self._waiting)

    def _make(self, calls: collections.deque[int]) -> None:
        """The first of them, in a worker; it stays among them should the server be gone."""
        number = calls[0]
        call = self._packed(number)
        while self._idle and self._idle[-1].generation != self._server.generation:
            self._end(self._idle[-1])
        worker = self._idle.pop() if self._idle else _Worker(*self._server.fork(), self._server.generation)
        calls.popleft()
        self._running.append(worker)
        self._selector.register(worker.channel, selectors.EVENT_READ | selectors.EVENT_WRITE, worker)
        worker.give(number, call, self._timeout)

    def _packed(self, number: int) -> bytes:
        """The arguments of a call; what they are made of is imported by the server, once, and not by each worker."""
        arguments = self._arguments[number]
        packed = io.BytesIO()
        pickler = _Pickler(packed)
        try:
            pickler.dump(dict(arguments) if isinstance(arguments, Mapping) else tuple(arguments))
        except Exception as error:
            raise TypeError(f"the arguments of call {number} cannot be sent to a worker process: {error}") from error
        self._server.load(pickler.modules)
        return packed.getvalue()

    def _answered(self, worker: _Worker, answer: bytes) -> None:
        try:
            kind, value, goes_on = _PlainUnpickler(io.BytesIO(answer)).load()
        except Exception:  # of bytes that the function has written itself
            self._fail(worker, "answer", "its worker sent something that is no answer")
            return
        if kind == "memory" and worker.calls > 1:
            self._again(worker)
            return
        self._answers[worker.number] = value if kind is None else Failure(str(kind), str(value)[:_LONGEST_MESSAGE])
        if goes_on:
            self._release(worker)
            self._idle.append(worker)
        else:
            self._end(worker)

    def _crashed(self, worker: _Worker) -> None:
        if worker.calls > 1:
            self._again(worker)
            return
        status = self._end(worker)
        ended = f"ended with exit status {status}"
        if status < 0:
            ended = f"was ended by {signal.Signals(-status).name if -status in set(signal.Signals) else -status}"
        self._answers[worker.number] = Failure("crash", f"its worker {ended}")

    def _fail(self, worker: _Worker, kind: str, message: str) -> None:
        self._answers[worker.number] = Failure(kind, message)
        self._end(worker)

    def _again(self, worker: _Worker) -> None:
        """In a worker of its own, as earlier calls may be to blame."""
        self._end(worker)
        self._waiting.appendleft(worker.number)
        while self._idle:
            self._end(self._idle[-1])
        self._make(self._waiting)

    def _release(self, worker: _Worker) -> None:
        self._selector.unregister(worker.channel)
        self._running.remove(worker)

    def _end(self, worker: _Worker) -> int:
        """Kills a worker with its children, unless it has ended already; tells how it did."""
        status = self._server.end(worker.process)
        if worker in self._running:
            self._release(worker)
        else:
            self._idle.remove(worker)
        worker.channel.close()
        return status

    def _without_server(self) -> None:
        """The end of the server is that of all workers; a call that was alone, in a new worker, has ended it."""
        self._server.close()
        guilty = len(self._running) == 1 and self._running[0].calls == 1
        for worker in (*self._running, *self._idle):
            _kill(worker.process)
            worker.channel.close()
        self._idle.clear()
        for worker in list(self._running):
            self._running.remove(worker)
            if self._answers[worker.number] is not _NO_ANSWER:
                continue
            if guilty:
                self._answers[worker.number] = Failure("crash", "the process that starts the workers ended with it")
            else:
                self._suspects.append(worker.number)
        self._selector.close()
        self._selector = selectors.DefaultSelector()


class _Server:
    """The process that forks workers, seen from this one.

    Args:
        order: what it is to do, pickled.
    """

    def __init__(self, order: bytes):
        self._order = order
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._has_forked = False
        self._modules: set[str] = set()
        self.generation = 0

    def start(self) -> None:
        """Unless it runs.

        Raises:
            ServerError: it cannot load the function.
        """
        if self._process is not None:
            return
        self._control, theirs = socket.socketpair()
        # One thread each, so that forks are safe and workers do not compete. Sets are in one order in all runs.
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SCRIPT, os.path.abspath(__file__), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for this process
                env={"PYTHONHASHSEED": "0", **one, **os.environ},
            )
        self._control.settimeout(_START_SECONDS)
        try:
            self._control.sendall(_SIZE.pack(len(self._order)) + self._order)
            told = _received(self._control)
        except TimeoutError:
            told = f"its imports took more than {_START_SECONDS:g} seconds".encode()
        except OSError:
            told = None
        if told is None:
            told = f"a fresh interpreter, {sys.executable}, ended with status {self._ended()}".encode()
        if told:
            self.close()
            raise ServerError(f"the function cannot be loaded in a worker process: {told.decode()}")
        self._control.settimeout(_SERVER_SECONDS)
        self._has_forked = False
        modules, self._modules = self._modules, set()
        self.load(modules)

    def load(self, modules: set[str]) -> None:
        """Imports modules, for the workers that are forked from then on."""
        if modules <= self._modules or self._control is None:
            return
        self._modules |= modules
        self.generation += 1
        names = " ".join(sorted(modules)).encode()
        self._control.settimeout(_START_SECONDS)
        self._ask(_IMPORT, len(names), [], names)
        self._control.settimeout(_SERVER_SECONDS)

    def fork(self) -> tuple[int, socket.socket]:
        """A new worker's process, and the channel to it."""
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            try:
                process = self._ask(_FORK, 0, [theirs.fileno()])
                if process < 0:
                    raise ServerError(f"no worker process can be started: {os.strerror(-process)}")
            except BaseException:
                ours.close()
                raise
        self._has_forked = True
        return process, ours

    def end(self, process: int) -> int:
        """Kills a worker, unless it has ended, and its children; its exit status, or less the signal that ended it."""
        return self._ask(_END, process, [])

    def _ask(self, what: bytes, number: int, files: list[int], more: bytes = b"") -> int:
        reply = None
        try:
            assert self._control is not None
            socket.send_fds(self._control, [_ORDER.pack(what, number)], files)
            self._control.sendall(more)
            reply = _exactly(self._control, _REPLY.size)
        except OSError:  # a timeout too
            pass
        if reply is None:
            if not self._has_forked:  # no call's doing
                raise ServerError("no worker process can be started: the one that is to fork them ends")
            raise _ServerGone
        return int(_REPLY.unpack(reply)[0])

    def close(self) -> None:
        """Ends it with its workers."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._ended()
        self._control = self._process = None

    def _ended(self) -> int:
        assert self._process is not None
        try:
            return self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


class _Pickler(pickle.Pickler):
    """Knows the modules, in full, of what it has pickled, but for builtins."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.modules: set[str] = set()

    def reducer_override(self, value: Any) -> Any:
        module = getattr(value if isinstance(value, type) else type(value), "__module__", "builtins")
        if module != "builtins":
            self.modules.add(module)
        return NotImplemented


class _PlainUnpickler(pickle.Unpickler):
    """Of plain data only: to load anything else would run what a worker says in this process."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is no plain data")


def _packed(function: Callable[..., Any]) -> tuple[str, bytes]:
    """A function, pickled, and by which module.

    Raises:
        TypeError: it cannot be.
    """
    try:
        data = pickle.dumps(function)
        if b"__main__" not in data:
            return "pickle", data
        why = "it is of the main script, which a worker process does not run"
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    refused = f"{function!r} cannot be sent to a worker process"
    try:
        import dill  # type: ignore[import-untyped]
    except ImportError:
        raise TypeError(f"{refused} ({why}): define it in a module that can be imported, or install dill") from None
    try:
        return "dill", dill.dumps(function, recurse=True)
    except Exception as error:
        raise TypeError(
            f"{refused} ({type(error).__name__}: {error}): define it in a module that can be imported, and make there "
            "what it needs"
        ) from error


def _exactly(source: socket.socket, size: int) -> bytes | None:
    """That many bytes, or None where the other side has ended before."""
    parts = bytearray()
    while len(parts) < size:
        part = source.recv(min(size - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _received(source: socket.socket) -> bytes | None:
    size = _exactly(source, _SIZE.size)
    return None if size is None else _exactly(source, _SIZE.unpack(size)[0])


def _kill(process: int) -> None:
    """A process and its group."""
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: of a group of zombies
            kill(process, signal.SIGKILL)


# In the server process


def _serve(control_file: int) -> None:
    """Loads the function, then forks and ends workers as it is told to, until the process that it is for has ended."""
    import importlib

    control, parent = socket.socket(fileno=control_file), os.getppid()
    if (given := _received(control)) is None:
        return
    order = pickle.loads(given)
    sys.path[:] = order["path"]
    try:
        module, data = order["function"]
        function = importlib.import_module(module).loads(data)
        told = b""
    except BaseException as error:
        told = f"{type(error).__name__}: {error}".encode(errors="replace")
    control.sendall(_SIZE.pack(len(told)) + told)
    if told:
        return
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    _set_process(_SET_CHILD_SUBREAPER, 1)  # what a worker leaves behind becomes a child of this process
    gc.collect()
    gc.freeze()  # forks share what is there
    workers: set[int] = set()
    try:
        while os.getppid() == parent:  # where a child of the parent's holds the socket open, its end is not seen there
            if not select.select([control], [], [], 1.0)[0]:
                continue
            message, files, *_ = socket.recv_fds(control, _ORDER.size, 1)
            if len(message) < _ORDER.size:
                return
            what, process = _ORDER.unpack(message)
            if what == _IMPORT:
                for name in (_exactly(control, process) or b"").decode().split():
                    with contextlib.suppress(Exception):  # the call that it is for will tell
                        importlib.import_module(name)
                gc.freeze()
                reply = 0
            elif what == _FORK:
                reply = _fork(function, files[0], control, order["memory"])
                os.close(files[0])
                if reply > 0:
                    workers.add(reply)
            else:
                reply = _ended(process) if process in workers else 0
                workers.discard(process)
                _end_orphans(workers)
            control.sendall(_REPLY.pack(reply))
    finally:
        for process in workers:
            _ended(process)
        _end_orphans(set())


def _ended(process: int) -> int:
    _kill(process)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _end_orphans(workers: set[int]) -> None:
    """Kills what workers have left behind in sessions of their own (Linux)."""
    for _ in range(100):  # their children come next
        try:
            with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
                orphans = {int(process) for process in file.read().split()} - workers
        except OSError:
            return
        if not orphans:
            return
        for orphan in orphans:
            _ended(orphan)


def _set_process(option: int, value: int) -> None:
    """prctl, where there is one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _fork(function: Callable[..., Any], channel_file: int, control: socket.socket, memory: int | None) -> int:
    """A worker's process, or less the number of the error."""
    server = os.getpid()
    try:
        process = os.fork()
    except OSError as error:
        return -(error.errno or 1)
    if process:
        return process
    try:
        os.setsid()
        _set_process(_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == server:
            control.close()
            os.set_inheritable(channel_file, False)
            channel = socket.socket(fileno=channel_file)
            os.register_at_fork(after_in_child=channel.close)
            _limit(memory)
            _work(function, channel)
    finally:
        os._exit(1)


# In a worker process


def _limit(memory: int | None) -> None:
    """No more memory than that besides what there is, and no core files."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory is not None and sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + memory
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _work(function: Callable[..., Any], channel: socket.socket) -> None:
    """Answers calls until there are no more, or until one has left something behind."""
    out_of_memory = _answer("memory", "MemoryError: the limit of memory is reached", False)
    goes_on = True
    while goes_on and (call := _received(channel)) is not None:
        try:
            answer, goes_on = _called(function, call)
        except MemoryError:
            answer, goes_on = out_of_memory, False
        channel.sendall(answer)


def _called(function: Callable[..., Any], call: bytes) -> tuple[bytes, bool]:
    """The answer of a call, and whether the worker may go on."""
    kind, value, goes_on = None, None, True
    try:
        arguments = pickle.loads(call)
        given = function(**arguments) if isinstance(arguments, dict) else function(*arguments)
        try:
            value = _plain(given)
        except TypeError as error:
            kind, value = "answer", str(error)
    except MemoryError:
        raise
    except Exception as error:
        kind, value = "error", _told(error)
    except BaseException as error:  # SystemExit, KeyboardInterrupt
        kind, value, goes_on = "crash", _told(error), False
    goes_on = goes_on and not _left_behind()
    answer = _answer(kind, value, goes_on)
    if len(answer) > _LARGEST_ANSWER:
        message = f"an answer of {len(answer)} bytes, where {_LARGEST_ANSWER} are the most"
        answer = _answer("answer", message, goes_on)
    return answer, goes_on


def _answer(kind: str | None, value: Any, goes_on: bool) -> bytes:
    data = pickle.dumps((kind, value, goes_on))
    return _SIZE.pack(len(data)) + data


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
    except Exception:  # of its own __str__
        return type(error).__name__


def _left_behind() -> bool:
    """Whether threads or processes are left of a call; its timers are stopped."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    if threading.active_count() > 1:
        return True
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _plain(value: Any) -> Any:
    """An answer as data that can be loaded without running anything.

    Raises:
        TypeError: it is something else.
    """
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return value
    if hasattr(value, "tolist"):  # arrays, tensors, and their scalars
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {_plain(key): _plain(each) for key, each in value.items()}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return (set if kind is frozenset else kind)(_plain(each) for each in value)
    for plain in (int, str, bytes):
        if isinstance(value, plain):
            return plain(value)  # type: ignore[arg-type]
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"an answer of type {type(value).__name__}, which is no plain data")

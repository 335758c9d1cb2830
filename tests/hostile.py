"""Functions that misbehave, for worker processes: a module of its own that imports little, as workers import it."""

import os
import signal
import subprocess
import sys
import threading
import time

CALLS = 0


def double(number):
    return 2 * number


def count():
    """How often it was called in this worker, and the worker."""
    global CALLS
    CALLS += 1
    return CALLS, os.getpid()


def nap(seconds):
    time.sleep(seconds)
    return os.getpid()


def misbehave(how, detail=None):
    """Does what `how` says; "well" returns the detail."""
    if how == "well":
        return detail
    return _WAYS[how](detail)


def _hang(_):
    while True:
        time.sleep(1)


def _spin(_):
    while True:
        pass


def _exit(status):
    os._exit(status)


def _sys_exit(_):
    sys.exit("enough")


def _kill(number):
    os.kill(os.getpid(), number)


def _kill_server(_):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(100)


def _stop_server(_):
    os.kill(os.getppid(), signal.SIGSTOP)
    return 0


def _raise(error):
    raise eval(error)


def _recurse(detail):
    return _recurse(detail)


def _allocate(_):
    kept = []
    while True:
        kept.append(bytearray(1 << 26))


def _leak(megabytes):
    _LEAKED.append(bytearray(megabytes << 20))
    return len(_LEAKED)


_LEAKED = []


def _segfault(_):
    import ctypes

    ctypes.string_at(0)


def _print(megabytes):
    line = "x" * (1 << 20)
    for _ in range(megabytes):
        print(line)
        print(line, file=sys.stderr)
        os.write(1, line.encode())
    return megabytes


def _large(megabytes):
    return b"x" * (megabytes << 20)


def _no_data(_):
    return object()


def _garbage(_):
    """Writes into whatever is open."""
    for file in range(3, 20):
        try:
            os.write(file, b"\x04\0\0\0\0\0\0\0abcd")
        except OSError:
            continue
    time.sleep(100)


def _child(mark):
    """Leaves a process behind, which writes its number."""
    subprocess.Popen([sys.executable, "-c", _CHILD, mark])
    return _wait_for(mark)


def _daemon(mark):
    subprocess.Popen([sys.executable, "-c", _CHILD, mark], start_new_session=True)
    _wait_for(mark)
    _hang(None)


def _child_and_hang(mark):
    _child(mark)
    _hang(None)


def _thread(_):
    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
    return os.getpid()


def _alarm(_):
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    return os.getpid()


_CHILD = """
import os, sys, time
with open(sys.argv[1] + ".part", "w") as file:
    file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(1000)
"""


def _wait_for(mark):
    while not os.path.exists(mark):
        time.sleep(0.01)
    with open(mark) as file:
        return int(file.read())


_WAYS = {name[1:]: way for name, way in list(globals().items()) if name[0] == "_" and name[1] != "_" and callable(way)}

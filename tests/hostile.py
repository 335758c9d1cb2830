"""Functions that misbehave, for worker processes: a module of its own that imports little, as workers import it."""

import os
import pickle
import signal
import sys
import threading
import time

CALLS = 0
IMPORTED_BY = os.getpid()


class Thing:
    def imported_by(self):
        return IMPORTED_BY


def double(number):
    return 2 * number


def count():
    """How often it was called in this worker, and the worker."""
    global CALLS
    CALLS += 1
    return CALLS, os.getpid()


def meet(folder, number, of):
    """Returns once all `of` are here at one time."""
    with open(os.path.join(folder, str(number)), "w"):
        pass
    while len(os.listdir(folder)) < of:
        time.sleep(0.01)
    return number


def loaded(name):
    return name in sys.modules


def judge(prompts, completions, completion_ids, trainer_state, how, **columns):
    """Returns a reward for the completion that it is given, or does what the column says."""
    (way,), ((token,),) = how, completion_ids
    if way == "hang":
        time.sleep(1000)
    if way == "exit":
        os._exit(0)
    if way == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "raise":
        raise KeyError("answer")
    if way == "print":
        print("x" * 10**7)
        sys.stderr.write("x" * 10**7)
    if way == "allocate":
        return [float(len(bytearray(1 << 36)))]
    if way == "large":
        return "x" * (100 << 20)
    if way == "nan":
        return [float("nan")]
    if way == "two":
        return [1.0, 2.0]
    if way == "none":
        return [None]
    return [float(token) + trainer_state.global_step]


def lossy(completion_ids, spare=False, **_):
    """The sum of the tokens, but for completions that end with a 4."""
    if completion_ids[0][-1] == 4 and not spare:
        raise ValueError("no fours")
    return [float(sum(completion_ids[0]))]


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


def _forge(mark):
    """Sends itself an answer that makes a folder where it is loaded."""
    answer = pickle.dumps(_MakesFolder(mark))
    for file in range(3, 20):
        try:
            os.write(file, len(answer).to_bytes(8, "little") + answer)
        except OSError:
            continue
    time.sleep(100)


class _MakesFolder:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def _child(mark, session=False):
    """Leaves a process behind, whose number it writes."""
    child = os.fork()
    if child == 0:
        if session:
            os.setsid()
        time.sleep(1000)
        os._exit(0)
    with open(mark, "w") as file:
        file.write(str(child))
    return child


def _child_and_hang(mark):
    _child(mark)
    _hang(None)


def _daemon_and_hang(mark):
    _child(mark, session=True)
    _hang(None)


def _thread(_):
    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
    return os.getpid()


def _alarm(_):
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    return os.getpid()


_WAYS = {name[1:]: way for name, way in list(globals().items()) if name[0] == "_" and name[1] != "_" and callable(way)}

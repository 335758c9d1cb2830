"""Programs of a few lines, each in a process of its own in which nothing of dam is loaded yet.

Each is a fork of a process that has imported torch, which a test process starts once: an import of torch takes longer
than what the programs do. `python -m tests.fresh` is that process.
"""

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(code, *arguments, cwd=ROOT, **environment):
    """What `python -c code arguments` ends with in a folder, of these variables besides those here; None is unset.

    Returns:
        a subprocess.CompletedProcess.
    """
    server = _server()
    given = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    request = {"code": code, "arguments": arguments, "cwd": str(cwd), "environment": given}
    print(json.dumps(request), file=server.stdin, flush=True)
    return subprocess.CompletedProcess(code, **json.loads(server.stdout.readline()))


def main(module, *arguments, cwd=ROOT, **environment):
    """The same of `python -m module arguments`."""
    return run(
        f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)",
        *arguments,
        cwd=cwd,
        **environment,
    )


@functools.cache
def _server():
    command = [sys.executable, "-m", "tests.fresh"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    atexit.register(server.stdin.close)
    return server


def _answers():
    import torch  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                os._exit(_status(**request))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            for file in (out, errors):
                file.seek(0)
            found = {"returncode": status, "stdout": out.read(), "stderr": errors.read()}
        print(json.dumps(found), file=answers, flush=True)


def _status(code, arguments, cwd, environment):
    """A fork's life, as the interpreter's own."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["-c", *arguments]
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return status


if __name__ == "__main__":
    _answers()

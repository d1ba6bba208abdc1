"""Runs many small programs in processes of their own without paying for the imports each time.

One interpreter per test session imports the library once; each program is a fork of it, with its own folder,
environment and standard streams. What a program costs is then its work, not half a second of imports; on a busy
machine that is most of the time. It has no thread when it forks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cli.programs import environment

_TIMEOUT = 60  # seconds a program may run before SIGALRM ends it

_SERVER = """
import json, os, runpy, signal, sys, traceback
import psycopg, trio, pgconductor
from pgconductor.cli import main

requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")

def become(request):
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:0] = os.environ["PYTHONPATH"].split(":")
    for number, name in enumerate(("in", "out", "err")):
        flags = os.O_RDONLY if name == "in" else os.O_WRONLY
        os.dup2(os.open(os.path.join(request["streams"], name), flags), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    signal.alarm(request["timeout"])

def work(program, *arguments):
    sys.argv = [program, *arguments]
    if program == "pgconductor":
        main()
    else:
        sys.path.insert(0, os.getcwd())
        runpy.run_path(program, run_name="__main__")

while line := requests.readline():
    request = json.loads(line)
    if (child := os.fork()) == 0:
        status = 0
        try:
            become(request)
            work(*request["arguments"])
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\\n")
    answers.flush()
"""


class Command(Protocol):
    """Runs ``pgconductor`` with these arguments to its end."""

    def __call__(
        self, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]: ...


class Interpreter:
    """The warm interpreter; one program at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(
        self, arguments: Sequence[str], folder: Path, environ: Mapping[str, str], stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run "pgconductor" with arguments, or a Python file with arguments, and return what came of it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as name:
            streams = Path(name)
            for stream, text in (("in", stdin), ("out", ""), ("err", "")):
                (streams / stream).write_text(text)
            request = {
                "arguments": list(arguments),
                "folder": str(folder),
                "environment": dict(environ),
                "streams": name,
                "timeout": _TIMEOUT,
            }
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            status = int(self._process.stdout.readline())
            out, err = ((streams / stream).read_text() for stream in ("out", "err"))
        return subprocess.CompletedProcess(list(arguments), status, out, err)

    def command(
        self, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """As `Command`."""
        return self.run(("pgconductor", *arguments), cwd or Path("/"), environment(**(env or {})), stdin)


@contextmanager
def warm_interpreter() -> Iterator[Interpreter]:
    """An interpreter that has imported the library, ended at the end of the block."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", _SERVER],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Interpreter(process)

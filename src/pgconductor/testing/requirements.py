"""What a test needs beyond Python and a database, as reasons to skip: each names the missing thing and the remedy.

    @pytest.mark.skipif(bool(reason := missing_program("pgbouncer", "apt-get install pgbouncer")), reason=reason)

Only looks; starts nothing that lasts.
"""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path


@cache
def missing_program(name: str, remedy: str) -> str:
    """Return why the program `name` cannot be used, with the remedy, or "" if it can."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    return "" if found else f"needs {name} ({remedy})"


@cache
def missing_docker() -> str:
    """Return why no container can be started, or "" if a Docker engine answers within 10 seconds."""
    if missing := missing_program("docker", "install Docker and start its engine"):
        return missing
    try:
        done = subprocess.run(["docker", "info"], capture_output=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return "needs a Docker engine: the one here does not answer"
    return "" if done.returncode == 0 else "needs a Docker engine: start it, or set DOCKER_HOST"


def debian_binaries(major: int) -> Path | None:
    """Return the `bin` folder of the Debian package of PostgreSQL `major`, or None if it is not installed."""
    folder = Path(f"/usr/lib/postgresql/{major}/bin")
    return folder if (folder / "initdb").exists() else None

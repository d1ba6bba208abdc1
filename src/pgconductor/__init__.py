"""Durable execution on nothing but PostgreSQL, native to Trio.

General layout: `conductor` (declare, invoke, wait), `sync_client` (the same without an event loop), `tasks`, `codec`,
`context`, `retry` (what a task is), `runtime` (what runs it), `db` (drives psycopg, `TrioConnection`
among it), `errors` (the tree of what can be raised), `testing` (a pytest plugin).
"""

from .codec import Limits
from .conductor import Conductor
from .context import Context
from .db.connection import TrioConnection
from .db.pool import Pool, PoolStatistics, open_pool
from .db.schema import MigrationReport, SchemaVersion
from .errors import (
    ExecutionCancelled,
    ExecutionError,
    ExecutionFailed,
    Incompatible,
    InvalidOption,
    InvalidPayload,
    InvalidTask,
    LeaseLost,
    Misuse,
    NoDatabase,
    NotOpen,
    PgconductorError,
    PoolTimeout,
    Refused,
    ResultNotKept,
    SchemaMissing,
    SchemaTooNew,
    Unavailable,
    Unstorable,
    WaitTimeout,
)
from .handle import Handle, SyncHandle
from .model import OrchestratorStatus, QueueStatus, State
from .retry import Backoff, Exponential
from .runtime.orchestrator import Drained, Orchestrator, OrchestratorStatistics
from .runtime.worker import WorkerStatistics
from .sync_client import SyncClient
from .tasks import Invocable, Invocation, SyncTaskCall, Task, TaskCall, Worker

__all__ = [  # noqa: RUF022 - grouped by what one does with them
    # Declaring and running
    "Backoff",
    "Conductor",
    "Context",
    "Exponential",
    "Limits",
    "Orchestrator",
    "Task",
    "Worker",
    # Invoking and waiting
    "Handle",
    "Invocable",
    "Invocation",
    "SyncClient",
    "SyncHandle",
    "SyncTaskCall",
    "TaskCall",
    # Reading
    "Drained",
    "MigrationReport",
    "OrchestratorStatistics",
    "OrchestratorStatus",
    "QueueStatus",
    "SchemaVersion",
    "State",
    "WorkerStatistics",
    # psycopg on Trio
    "Pool",
    "PoolStatistics",
    "TrioConnection",
    "open_pool",
    # Errors, as the tree in `errors` has them
    "ExecutionCancelled",
    "ExecutionError",
    "ExecutionFailed",
    "Incompatible",
    "InvalidOption",
    "InvalidPayload",
    "InvalidTask",
    "LeaseLost",
    "Misuse",
    "NoDatabase",
    "NotOpen",
    "PgconductorError",
    "PoolTimeout",
    "Refused",
    "ResultNotKept",
    "SchemaMissing",
    "SchemaTooNew",
    "Unavailable",
    "Unstorable",
    "WaitTimeout",
]

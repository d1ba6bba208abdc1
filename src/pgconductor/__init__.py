"""Durable execution on nothing but PostgreSQL, native to Trio.

General layout: `conductor` (declare, invoke, wait), `sync_client` (the same without an event loop), `tasks`, `codec`,
`context`, `retry` (what a task is), `runtime` (what runs it), `db` (drives psycopg, `TrioConnection`
among it), `errors` (the tree of what can be raised), `testing` (a pytest plugin).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .channels import Channel
    from .children import ChildHandle, DurableNursery, StepHandle
    from .codec import Limits
    from .conductor import Conductor
    from .context import Context
    from .db.connection import TrioConnection
    from .db.pool import Pool, PoolStatistics, open_pool
    from .db.schema import MigrationReport, SchemaVersion
    from .durable import Tries
    from .errors import (
        AttemptError,
        ChildCancelled,
        ChildError,
        ChildFailed,
        ChildTimedOut,
        DeadlineExceeded,
        DurableError,
        DurableMisuse,
        ExecutionCancelled,
        ExecutionError,
        ExecutionFailed,
        HandlerCancelled,
        HandlerTimeout,
        Incompatible,
        InvalidOption,
        InvalidPayload,
        InvalidTask,
        LeaseLost,
        Misuse,
        NoDatabase,
        NonDeterminism,
        NoRetry,
        NotOpen,
        PgconductorError,
        PoolTimeout,
        PromiseRejected,
        Refused,
        ResultNotKept,
        RetryAfter,
        SchemaMissing,
        SchemaTooNew,
        Snooze,
        StepFailed,
        Unavailable,
        Unstorable,
        Unwinding,
        Verdict,
        WaitTimedOut,
        WaitTimeout,
    )
    from .events import Promise
    from .handle import Handle, SyncHandle
    from .model import (
        CancelCounts,
        Cancellation,
        DeadLetter,
        Divergence,
        ExecutionStatus,
        ExecutionSummary,
        FailedAttempt,
        OpenWait,
        OrchestratorStatus,
        PromiseAnswer,
        QueueStatus,
        ReplayReport,
        Retry,
        RetryCounts,
        State,
        StepRecord,
        Trouble,
    )
    from .readers import ChannelReader, SyncChannelReader
    from .retry import Backoff, Delays, Exponential, Fixed, Linear
    from .runtime.orchestrator import Drained, Orchestrator, OrchestratorStatistics
    from .runtime.worker import WorkerStatistics
    from .sync_client import SyncClient
    from .sync_context import SyncContext, SyncPromise
    from .tasks import Invocable, Invocation, SyncTaskCall, Task, TaskCall, Worker

__all__ = [  # noqa: RUF022 - grouped by what one does with them
    # Declaring and running
    "Backoff",
    "Conductor",
    "Context",
    "Delays",
    "Exponential",
    "Fixed",
    "Limits",
    "Linear",
    "Orchestrator",
    "Task",
    "Worker",
    # What a handler raises
    "NoRetry",
    "RetryAfter",
    "Snooze",
    "Verdict",
    # Durable operations
    "Channel",
    "ChildHandle",
    "DurableNursery",
    "Promise",
    "StepHandle",
    "SyncContext",
    "SyncPromise",
    "Tries",
    # Invoking and waiting
    "ChannelReader",
    "Handle",
    "Invocable",
    "Invocation",
    "SyncChannelReader",
    "SyncClient",
    "SyncHandle",
    "SyncTaskCall",
    "TaskCall",
    # Reading
    "CancelCounts",
    "Cancellation",
    "DeadLetter",
    "Divergence",
    "Drained",
    "ExecutionStatus",
    "ExecutionSummary",
    "FailedAttempt",
    "MigrationReport",
    "OpenWait",
    "OrchestratorStatistics",
    "OrchestratorStatus",
    "PromiseAnswer",
    "QueueStatus",
    "ReplayReport",
    "Retry",
    "RetryCounts",
    "SchemaVersion",
    "State",
    "StepRecord",
    "Trouble",
    "WorkerStatistics",
    # psycopg on Trio
    "Pool",
    "PoolStatistics",
    "TrioConnection",
    "open_pool",
    # Errors, as the tree in `errors` has them
    "AttemptError",
    "ChildCancelled",
    "ChildError",
    "ChildFailed",
    "ChildTimedOut",
    "DeadlineExceeded",
    "DurableError",
    "DurableMisuse",
    "ExecutionCancelled",
    "ExecutionError",
    "ExecutionFailed",
    "HandlerCancelled",
    "HandlerTimeout",
    "Incompatible",
    "InvalidOption",
    "InvalidPayload",
    "InvalidTask",
    "LeaseLost",
    "Misuse",
    "NoDatabase",
    "NonDeterminism",
    "NotOpen",
    "PgconductorError",
    "PoolTimeout",
    "PromiseRejected",
    "Refused",
    "ResultNotKept",
    "SchemaMissing",
    "SchemaTooNew",
    "StepFailed",
    "Unavailable",
    "Unstorable",
    "Unwinding",
    "WaitTimedOut",
    "WaitTimeout",
]

_MODULES = {
    "AttemptError": "errors",
    "Backoff": "retry",
    "CancelCounts": "model",
    "Cancellation": "model",
    "Channel": "channels",
    "ChannelReader": "readers",
    "ChildCancelled": "errors",
    "ChildError": "errors",
    "ChildFailed": "errors",
    "ChildHandle": "children",
    "ChildTimedOut": "errors",
    "Conductor": "conductor",
    "Context": "context",
    "DeadLetter": "model",
    "DeadlineExceeded": "errors",
    "Delays": "retry",
    "Divergence": "model",
    "Drained": "runtime.orchestrator",
    "DurableError": "errors",
    "DurableMisuse": "errors",
    "DurableNursery": "children",
    "ExecutionCancelled": "errors",
    "ExecutionError": "errors",
    "ExecutionFailed": "errors",
    "ExecutionStatus": "model",
    "ExecutionSummary": "model",
    "Exponential": "retry",
    "FailedAttempt": "model",
    "Fixed": "retry",
    "Handle": "handle",
    "HandlerCancelled": "errors",
    "HandlerTimeout": "errors",
    "Incompatible": "errors",
    "InvalidOption": "errors",
    "InvalidPayload": "errors",
    "InvalidTask": "errors",
    "Invocable": "tasks",
    "Invocation": "tasks",
    "LeaseLost": "errors",
    "Limits": "codec",
    "Linear": "retry",
    "MigrationReport": "db.schema",
    "Misuse": "errors",
    "NoDatabase": "errors",
    "NoRetry": "errors",
    "NonDeterminism": "errors",
    "NotOpen": "errors",
    "OpenWait": "model",
    "Orchestrator": "runtime.orchestrator",
    "OrchestratorStatistics": "runtime.orchestrator",
    "OrchestratorStatus": "model",
    "PgconductorError": "errors",
    "Pool": "db.pool",
    "PoolStatistics": "db.pool",
    "PoolTimeout": "errors",
    "Promise": "events",
    "PromiseAnswer": "model",
    "PromiseRejected": "errors",
    "QueueStatus": "model",
    "Refused": "errors",
    "ReplayReport": "model",
    "ResultNotKept": "errors",
    "Retry": "model",
    "RetryAfter": "errors",
    "RetryCounts": "model",
    "SchemaMissing": "errors",
    "SchemaTooNew": "errors",
    "SchemaVersion": "db.schema",
    "Snooze": "errors",
    "State": "model",
    "StepFailed": "errors",
    "StepHandle": "children",
    "StepRecord": "model",
    "SyncChannelReader": "readers",
    "SyncClient": "sync_client",
    "SyncContext": "sync_context",
    "SyncPromise": "sync_context",
    "SyncHandle": "handle",
    "SyncTaskCall": "tasks",
    "Task": "tasks",
    "TaskCall": "tasks",
    "Tries": "durable",
    "TrioConnection": "db.connection",
    "Trouble": "model",
    "Unavailable": "errors",
    "Unstorable": "errors",
    "Unwinding": "errors",
    "Verdict": "errors",
    "WaitTimedOut": "errors",
    "WaitTimeout": "errors",
    "Worker": "tasks",
    "WorkerStatistics": "runtime.worker",
    "open_pool": "db.pool",
}


def __getattr__(name: str) -> object:
    # Each name is imported when it is first used: pytest loads this package in every run of whoever has it installed,
    # and declaring tasks needs neither the driver nor the engine.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]

"""What the package exports, and where it finds the database that comes with it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Set
from contextlib import contextmanager

import pytest
from client.database import until, value

import pgconductor
from pgconductor import (
    Channel,
    Conductor,
    Context,
    Handle,
    PgconductorError,
    Promise,
    SyncChannel,
    SyncClient,
    SyncContext,
    SyncHandle,
    SyncPromise,
    errors,
)
from pgconductor.testing import Databases, DatabaseServer


def test_exported_names_are_these() -> None:
    """A name added or lost by accident: they are the contract."""
    assert set(pgconductor.__all__) == {
        "Advice",
        "AttemptError",
        "Backoff",
        "BatchContext",
        "BatchItem",
        "CancelCounts",
        "Cancellation",
        "Channel",
        "ChannelReader",
        "ChildCancelled",
        "ChildError",
        "ChildFailed",
        "ChildHandle",
        "ChildTimedOut",
        "Conductor",
        "Context",
        "DeadLetter",
        "DeadlineExceeded",
        "Delays",
        "Divergence",
        "Drained",
        "DurableError",
        "DurableMisuse",
        "DurableNursery",
        "ExecutionCancelled",
        "ExecutionError",
        "ExecutionFailed",
        "ExecutionStatus",
        "ExecutionSummary",
        "Exponential",
        "FailedAttempt",
        "Fixed",
        "Handle",
        "HandlerCancelled",
        "HandlerTimeout",
        "Incompatible",
        "InvalidOption",
        "InvalidPayload",
        "InvalidTask",
        "Invocable",
        "Invocation",
        "LeaseLost",
        "Limits",
        "Linear",
        "MigrationReport",
        "Misuse",
        "NoDatabase",
        "NoRetry",
        "NonDeterminism",
        "NotOpen",
        "OpenWait",
        "Orchestrator",
        "OrchestratorStatistics",
        "OrchestratorStatus",
        "PgconductorError",
        "Pool",
        "PoolStatistics",
        "PoolTimeout",
        "Promise",
        "PromiseAnswer",
        "PromiseRejected",
        "QueueLoad",
        "QueueStatus",
        "Recommendation",
        "Refused",
        "ReplayReport",
        "ResultNotKept",
        "Retry",
        "RetryAfter",
        "RetryCounts",
        "SchemaMissing",
        "SchemaTooNew",
        "SchemaVersion",
        "Snooze",
        "State",
        "StepFailed",
        "StepHandle",
        "StepRecord",
        "SyncChannel",
        "SyncChannelReader",
        "SyncClient",
        "SyncContext",
        "SyncHandle",
        "SyncPromise",
        "SyncTaskCall",
        "Task",
        "TaskCall",
        "Tries",
        "TrioConnection",
        "Trouble",
        "Unavailable",
        "Unstorable",
        "Unwinding",
        "Verdict",
        "WaitTimedOut",
        "WaitTimeout",
        "Worker",
        "WorkerStatistics",
        "open_pool",
        "tune_garbage_collector",
    }
    assert len(set(pgconductor.__all__)) == len(pgconductor.__all__)
    for name in pgconductor.__all__:
        assert getattr(pgconductor, name).__doc__, f"{name} says nothing"


NOTHING: frozenset[str] = frozenset()


def _methods(kind: type[object]) -> dict[str, list[tuple[str, object, object]]]:
    return {
        name: [(each.name, each.kind, each.default) for each in inspect.signature(value).parameters.values()]
        for name, value in vars(kind).items()
        if not name.startswith("_") and inspect.isfunction(value)
    }


@pytest.mark.parametrize(
    ("on_trio", "blocking", "lacking", "other"),
    [
        (
            Conductor,
            SyncClient,
            {"redirect", "thread_transactions", "sync", "invoke_many_sync", "check_schema", "replay_check"},
            {"invoke", "invoke_many"},  # these take a task, which has an `invoke` of its own on Trio
        ),
        (Handle, SyncHandle, NOTHING, NOTHING),
        (
            Context,
            SyncContext,
            {
                "attach", "watch", "close", "check_cancelled", "resource",  # not of the durable operations
                "nursery", "continue_as", "continue_as_new",
            },
            NOTHING,
        ),
        (Promise, SyncPromise, NOTHING, NOTHING),
        (Channel, SyncChannel, {"aclose"}, NOTHING),
    ],
)  # fmt: skip
def test_blocking_faces_have_the_methods_and_parameters_of_those_on_trio(
    on_trio: type[object], blocking: type[object], lacking: Set[str], other: Set[str]
) -> None:
    """What one has learned of one of them is wrong of the other: a name, an order, a default."""
    ours, theirs = _methods(on_trio), _methods(blocking)
    assert ours.keys() - theirs.keys() == lacking
    assert theirs.keys() - ours.keys() == ({"close"} if blocking is SyncChannel else set())
    for name in ours.keys() & theirs.keys() - other:
        assert ours[name] == theirs[name], name


def test_all_errors_are_exported() -> None:
    """An exception that can be raised but not caught by name."""
    raised = {
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, PgconductorError) and kind.__module__ == errors.__name__
    }
    assert raised <= set(pgconductor.__all__)


async def test_embedded_server_is_held_while_open(
    monkeypatch: pytest.MonkeyPatch, pgconductor_server: DatabaseServer, pgconductor_databases: Databases
) -> None:
    """A server that ends under its user, that is not let go, or that is started without being asked for.

    The server is a stand-in: `tests/test_embedded.py` has the real one.
    """
    events: list[str] = []

    class Server:
        def ensure_database(self, name: str) -> str:
            events.append(f"database {name}")
            return dsn

    @contextmanager
    def embedded_server() -> Iterator[Server]:
        events.append("start")
        yield Server()
        events.append("stop")

    monkeypatch.setattr("pgconductor.embedded.embedded_server", embedded_server)
    conductor = Conductor(embedded=True)
    with pgconductor_databases.installed() as dsn:
        async with conductor:
            async with conductor:
                assert conductor.conninfo == conductor.listen_conninfo == dsn
            assert await conductor.queue_status() == []
            assert events == ["start", "database pgconductor"]
        assert events.pop() == "stop"
        events.clear()
        with conductor.sync() as client:
            assert client.queue_status() == []
            assert events == ["start", "database pgconductor"]
        assert events.pop() == "stop"
        sessions = "select count(*) from pg_stat_activity where datname = current_database()"
        await until(lambda: value(dsn, sessions) == 1)  # the server takes a moment to see that one was closed

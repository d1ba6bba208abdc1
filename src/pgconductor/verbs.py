"""What a client asks of the database, written once for the client on Trio and the one that blocks its thread.

A verb is a request, or a generator of requests: it yields what to ask, is sent each answer (or has the `Unavailable`
of an unanswered one thrown in), and returns what the caller gets. Arguments are checked when the verb is called, so
that nothing is sent for a bad one. No I/O here: `follow` and `follow_sync` are driven by the clients' own asking.

Invariant: a request says whether asking it twice is harmless; a client repeats it after a lost reply only then.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar, cast
from uuid import UUID

from .codec import Limits
from .db.call import Call
from .db.calls import Calls, ExecutionFilter, NewExecution
from .errors import InvalidOption, Unavailable, WaitTimeout
from .events import checked_event, checked_retention, encoded, payload_codec
from .handle import AnyHandle
from .history import MAX_NAME_BYTES
from .model import (
    Begun,
    CancelCounts,
    Cancellation,
    DeadLetter,
    Ended,
    ExecutionStatus,
    ExecutionSummary,
    FailedAttempt,
    Invoked,
    Looked,
    OrchestratorStatus,
    Page,
    PromiseAnswer,
    QueueLoad,
    QueueStatus,
    Retry,
    RetryCounts,
    Standing,
    State,
    StepRecord,
    StoredHistories,
)
from .options import checked_instant, checked_int, checked_text
from .outcomes import FINISHED, not_kept, unanswered_timeout, wait_timeout
from .tasks import Task, checked_tags

T = TypeVar("T")

MAX_REASON_BYTES: Final = 1_000
MAX_MESSAGE_BYTES: Final = 8_000  # of a rejection
MAX_COUNT: Final = 2**31 - 1
_CHUNK: Final = 1_000  # executions per statement of a verb that takes a filter

MAX_PAGE: Final = 10_000
_FIRST_LOOK: Final = 1_000  # rows that a search looks at in its first statement; each further one at four times as many
_LONGEST_LOOK: Final = 50_000

LIVE_STATES: Final = tuple(state for state in State if state not in FINISHED)
DEAD_STATES: Final = (State.FAILED, State.CANCELLED)
States: TypeAlias = Iterable[State | str] | State | str | None


@dataclass(frozen=True, slots=True)
class Request(Generic[T]):
    """One statement to execute. `doing` completes "while ..." in messages.

    `is_repeatable`: it may be sent a second time when the reply of the first is lost.
    """

    call: Call[T]
    doing: str
    is_repeatable: bool = True


Steps: TypeAlias = Generator[Request[Any], Any, T]


class Ask(Protocol):
    """Executes a request on a connection of the client's; raises `Unavailable` when that may work later."""

    async def __call__(self, request: Request[T], /) -> T: ...


async def follow(steps: Steps[T], ask: Callable[[Request[Any]], Awaitable[Any]]) -> T:
    """Ask what `steps` wants to know until it is done; return what it returns."""
    try:
        request = next(steps)
        while True:
            try:
                answer = await ask(request)
            except Unavailable as error:
                request = steps.throw(error)
            else:
                request = steps.send(answer)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]  # the type that Steps names


def follow_sync(steps: Steps[T], ask: Callable[[Request[Any]], Any]) -> T:
    """`follow`, blocking the thread."""
    try:
        request = next(steps)
        while True:
            try:
                answer = ask(request)
            except Unavailable as error:
                request = steps.throw(error)
            else:
                request = steps.send(answer)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]  # the type that Steps names


def _asked(request: Request[T]) -> Steps[T]:
    """Ask one request, with its type."""
    answer: T = yield request
    return answer


class Verbs:
    """The verbs of one schema, with the limits of one conductor."""

    def __init__(self, calls: Calls, limits: Limits) -> None:
        self._calls = calls
        self._limits = limits

    # Invoking

    def invoke_many(self, executions: Sequence[NewExecution]) -> Request[list[Invoked]]:
        """Insert executions. To be repeated only if each has a dedupe key: else there would be two."""
        is_repeatable = all(execution.dedupe_key is not None for execution in executions)
        return Request(self._calls.invoke_many(executions), "invoking", is_repeatable)

    # Reading

    def queue_status(self) -> Request[list[QueueStatus]]:
        return Request(self._calls.queue_status(), "reading the queues")

    def queue_load(self, queue: str | None) -> Request[list[QueueLoad]]:
        """Raises `InvalidOption`."""
        return Request(self._calls.queue_load(self._name("queue", queue)), "looking at the load")

    def orchestrator_status(self) -> Request[list[OrchestratorStatus]]:
        return Request(self._calls.orchestrator_status(), "reading the orchestrators")

    def results(self, ids: Sequence[UUID]) -> Request[dict[UUID, Ended]]:
        return Request(self._calls.results(list(ids)), "looking for results")

    def standing(self, ids: Sequence[UUID]) -> Request[dict[UUID, Standing]]:
        return Request(self._calls.standing(list(ids)), "looking for executions")

    def last_look(self, task: Task[..., Any], execution_id: UUID, timeout: float | None) -> Steps[Ended]:
        """How an execution ended, looking once; raises `WaitTimeout` with where it stands, or `ResultNotKept`."""
        try:
            for _ in range(2):  # it may finish between the two questions
                found = yield from _asked(self.results([execution_id]))
                if execution_id in found:
                    return found[execution_id]
                standing = (yield from _asked(self.standing([execution_id])))[execution_id]
                if standing.state is None:
                    raise not_kept(task, execution_id)
                if standing.state not in FINISHED:
                    raise wait_timeout(task, timeout, standing)
        except WaitTimeout:
            raise
        except Unavailable as error:
            raise unanswered_timeout(task, execution_id, timeout) from error
        raise unanswered_timeout(task, execution_id, timeout)

    def execution_errors(self, execution: UUID | AnyHandle[Any]) -> Request[list[FailedAttempt]]:
        """The errors of its attempts. Raises `InvalidOption`, as the next two."""
        call = self._calls.execution_errors(checked_id("execution_errors", execution))
        return Request(call, "reading an execution's errors")

    def execution_details(self, execution: UUID | AnyHandle[Any]) -> Request[ExecutionStatus | None]:
        return Request(self._calls.execution_details(checked_id("status", execution)), "reading an execution")

    def execution_steps(self, execution: UUID | AnyHandle[Any]) -> Request[list[StepRecord]]:
        return Request(self._calls.execution_steps(checked_id("steps", execution)), "reading an execution's steps")

    def executions(
        self,
        *,
        queue: str | None,
        task: str | None,
        states: States,
        created_after: datetime | None,
        created_before: datetime | None,
        tags: Iterable[str] | None,
        dedupe_key: str | None,
        parent: UUID | AnyHandle[Any] | None,
        root: UUID | AnyHandle[Any] | None,
        limit: int,
        after: ExecutionSummary | None,
    ) -> Steps[list[ExecutionSummary]]:
        """A page of executions, by statements that each look at a bounded number. Raises `InvalidOption`."""
        limit = checked_int("limit", limit, minimum=1, maximum=MAX_PAGE)
        if after is not None and not isinstance(cast(object, after), ExecutionSummary):
            raise InvalidOption(
                f"after must be the last ExecutionSummary of the page before, not {type(after).__name__}"
            )
        filters = ExecutionFilter(
            queue=self._name("queue", queue),
            task=self._name("task", task),
            states=None if states is None else [state.value for state in _checked_states(states, tuple(State))],
            created_after=None if created_after is None else checked_instant("created_after", created_after),
            created_before=None if created_before is None else checked_instant("created_before", created_before),
            tags=None if tags is None else _checked_tags(tags),
            dedupe_key=None
            if dedupe_key is None
            else checked_text("dedupe_key", dedupe_key, max_bytes=self._limits.dedupe_key_bytes),
            parent=None if parent is None else checked_id("executions(parent=)", parent),
            root=None if root is None else checked_id("executions(root=)", root),
        )
        return self._look(filters, limit, None if after is None else after.id)

    def _look(self, filters: ExecutionFilter, limit: int, after: UUID | None) -> Steps[list[ExecutionSummary]]:
        found: list[ExecutionSummary] = []
        look = max(_FIRST_LOOK, limit)
        while True:
            call = self._calls.list_executions(filters, limit - len(found), after, look)
            looked: Looked = yield from _asked(Request(call, "looking for executions"))
            found += looked.found
            if looked.go_on is None or len(found) == limit:
                return found
            after, look = looked.go_on, min(4 * look, _LONGEST_LOOK)

    def stored_histories(
        self, *, queue: str | None, task: str | None, limit: int, after: UUID | None
    ) -> Request[StoredHistories]:
        """A page of live executions with what they have recorded. Raises `InvalidOption`."""
        call = self._calls.stored_histories(self._name("queue", queue), self._name("task", task), limit, after)
        return Request(call, "reading histories")

    # Cancelling

    def cancel(
        self, executions: Sequence[UUID | AnyHandle[Any]], reason: str | None
    ) -> Request[dict[UUID, Cancellation]]:
        """Cancel executions by id. Raises `InvalidOption`."""
        ids = self._ids("cancel", executions)
        return Request(self._calls.cancel(ids, checked_reason(reason)), "cancelling")

    def cancel_matching(
        self,
        *,
        queue: str | None,
        task: str | None,
        states: States,
        tags: Iterable[str] | None,
        created_before: datetime | None,
        reason: str | None,
        limit: int | None,
        everything: bool,
    ) -> Steps[CancelCounts]:
        """Cancel by filter, in chunks, until nothing is left or the limit is reached. Raises `InvalidOption`."""
        reason = checked_reason(reason)
        limit = checked_limit(limit)
        queue, task = self._name("queue", queue), self._name("task", task)
        wanted = None if states is None else [state.value for state in _checked_states(states, LIVE_STATES)]
        with_tags = None if tags is None else _checked_tags(tags)
        before = None if created_before is None else checked_instant("created_before", created_before)
        _require_filter("cancel_matching", (queue, task, wanted, with_tags, before), everything)

        def cancel(chunk: int) -> Request[CancelCounts]:
            call = self._calls.cancel_matching(reason, chunk, queue, task, wanted, with_tags, before)
            return Request(call, "cancelling")

        return self._cancel_in_chunks(cancel, limit)

    def _cancel_in_chunks(
        self, cancel: Callable[[int], Request[CancelCounts]], limit: int | None
    ) -> Steps[CancelCounts]:
        cancelled = requested = 0
        while (chunk := _chunk(limit, cancelled + requested)) > 0:
            counts = yield from _asked(cancel(chunk))
            if not counts.cancelled and not counts.requested:
                break
            cancelled += counts.cancelled
            requested += counts.requested
        return CancelCounts(cancelled, requested)

    # Events

    def emit(self, event: str, payload: object, retention: object) -> Request[int]:
        """Send an event. Not repeated unasked: it would be sent twice. Raises `InvalidOption`, `InvalidPayload`."""
        call = self._calls.emit(
            checked_event("the name of an event", event), encoded(payload, self._limits), checked_retention(retention)
        )
        return Request(call, "sending an event", is_repeatable=False)

    def send(self, execution: UUID | AnyHandle[Any], channel: str, payload: object) -> Request[bool]:
        """Send a message; as `emit`."""
        call = self._calls.send(
            checked_id("send", execution),
            checked_event("the name of a channel", channel),
            encoded(payload, self._limits),
        )
        return Request(call, "sending a message", is_repeatable=False)

    def resolve_promise(self, promise: UUID, value: object) -> Request[PromiseAnswer]:
        """Resolve a promise. Not repeated unasked: the answer would be that of the second. Raises `InvalidOption`."""
        call = self._calls.resolve_promise(_promise_id(promise), encoded(value, self._limits))
        return Request(call, "resolving a promise", is_repeatable=False)

    def reject_promise(self, promise: UUID, message: str) -> Request[PromiseAnswer]:
        """Reject a promise; as `resolve_promise`."""
        call = self._calls.reject_promise(
            _promise_id(promise), checked_text("message", message, max_bytes=MAX_MESSAGE_BYTES)
        )
        return Request(call, "rejecting a promise", is_repeatable=False)

    def read_channel(self, execution: UUID, name: str, after: int, limit: int) -> Request[Page]:
        return Request(self._calls.read_channel(execution, name, after, limit), "reading a channel")

    def progress(self, execution: UUID | AnyHandle[Any]) -> Request[dict[UUID, str | None]]:
        """What an execution last told. Raises `InvalidOption`."""
        return Request(self._calls.progress([checked_id("progress", execution)]), "reading the progress")

    def decode_progress(self, told: dict[UUID, str | None]) -> Any:
        """What `progress` was answered, as a value; None if nothing was told, or is kept."""
        return payload_codec(Any, self._limits).decode(next(iter(told.values()), None) or "null")

    # Dead letters

    def dead_letters(
        self, *, queue: str | None, task: str | None, states: States, limit: int, after: DeadLetter | None
    ) -> Request[list[DeadLetter]]:
        """A page of executions that failed or were cancelled. Raises `InvalidOption`."""
        limit = checked_int("limit", limit, minimum=1, maximum=MAX_PAGE)
        if after is not None and not isinstance(cast(object, after), DeadLetter):
            raise InvalidOption(f"after must be the last DeadLetter of the page before, not {type(after).__name__}")
        call = self._calls.dead_letters(
            self._name("queue", queue), self._name("task", task), limit, after, _checked_states(states, DEAD_STATES)
        )
        return Request(call, "reading the dead letters")

    def retry(self, executions: Sequence[UUID | AnyHandle[Any]]) -> Request[dict[UUID, Retry]]:
        """Let dead letters begin anew. Not repeated unasked: one may have failed again. Raises `InvalidOption`."""
        return Request(self._calls.retry(self._ids("retry", executions)), "retrying", is_repeatable=False)

    def retry_matching(
        self,
        *,
        queue: str | None,
        task: str | None,
        error_type: str | None,
        states: States,
        finished_after: datetime | None,
        finished_before: datetime | None,
        limit: int | None,
        everything: bool,
    ) -> Steps[RetryCounts]:
        """Retry by filter, in chunks, until nothing is left or the limit is reached. Raises `InvalidOption`."""
        limit = checked_limit(limit)
        queue, task = self._name("queue", queue), self._name("task", task)
        error_type = None if error_type is None else checked_text("error_type", error_type, max_bytes=1_000)
        after = None if finished_after is None else checked_instant("finished_after", finished_after)
        before = None if finished_before is None else checked_instant("finished_before", finished_before)
        chosen = None if states is None else _checked_states(states, DEAD_STATES)
        _require_filter("retry_matching", (queue, task, error_type, chosen, after, before), everything)
        wanted = chosen or [State.FAILED]

        def newest() -> Request[list[DeadLetter]]:
            return Request(self._calls.dead_letters(queue, task, 1, None, wanted), "retrying")

        def retry(chunk: int, before: datetime) -> Request[RetryCounts]:
            call = self._calls.retry_matching(queue, task, error_type, after, before, chunk, wanted)
            return Request(call, "retrying", is_repeatable=False)

        return self._retry_in_chunks(newest, retry, before, limit)

    def _retry_in_chunks(
        self,
        newest: Callable[[], Request[list[DeadLetter]]],
        retry: Callable[[int, datetime], Request[RetryCounts]],
        before: datetime | None,
        limit: int | None,
    ) -> Steps[RetryCounts]:
        retried = duplicates = 0
        if before is None:
            # What fails again meanwhile is not to be retried again and again.
            page = yield from _asked(newest())
            if not page:
                return RetryCounts(0, 0)
            before = page[0].finished_at + timedelta(microseconds=1)
        while (chunk := _chunk(limit, retried)) > 0:
            counts = yield from _asked(retry(chunk, before))
            if not counts.retried and not counts.duplicates:
                break
            retried += counts.retried
            duplicates += counts.duplicates
        return RetryCounts(retried, duplicates)

    # Beginning anew

    def fork(self, execution: UUID | AnyHandle[Any], from_step: str) -> Request[Begun]:
        """Begin a new execution from a step of another one. Raises `InvalidOption`."""
        step = checked_text("from_step", from_step, max_bytes=MAX_NAME_BYTES)
        return Request(self._calls.fork(checked_id("fork", execution), step), "forking", is_repeatable=False)

    def restart(self, execution: UUID | AnyHandle[Any]) -> Request[Begun]:
        """Begin a new execution of the same task and payload. Raises `InvalidOption`."""
        return Request(self._calls.restart(checked_id("restart", execution)), "restarting", is_repeatable=False)

    def _name(self, what: str, name: str | None) -> str | None:
        return None if name is None else checked_text(what, name, max_bytes=self._limits.name_bytes)

    def _ids(self, verb: str, executions: Sequence[UUID | AnyHandle[Any]]) -> list[UUID]:
        ids = list(dict.fromkeys(checked_id(verb, execution) for execution in executions))
        if len(ids) > self._limits.batch:
            raise InvalidOption(f"{verb} takes at most {self._limits.batch:,} executions at once; split them")
        return ids


def checked_reason(reason: object) -> str | None:
    """Return a cancellation's reason if it is None or a text of 1 to 1,000 bytes, or raise `InvalidOption`."""
    return None if reason is None else checked_text("reason", reason, max_bytes=MAX_REASON_BYTES)


def checked_limit(limit: object) -> int | None:
    """Return how many to take at most, None for all; raises `InvalidOption`."""
    return None if limit is None else checked_int("limit", limit, minimum=1, maximum=MAX_COUNT)


def _chunk(limit: int | None, done: int) -> int:
    return _CHUNK if limit is None else min(_CHUNK, limit - done)


def checked_id(verb: str, execution: object) -> UUID:
    """Return the id of an execution, given as one or as a handle, or raise `InvalidOption`."""
    if isinstance(execution, AnyHandle):
        return execution.id
    if isinstance(execution, UUID):
        return execution
    raise InvalidOption(f"{verb} takes handles and ids (uuid.UUID), not {type(execution).__name__}")


def _promise_id(promise: object) -> UUID:
    if isinstance(promise, UUID):
        return promise
    raise InvalidOption(f"a promise is named by its id (uuid.UUID), not {type(promise).__name__}")


def _checked_states(states: States, allowed: Sequence[State]) -> list[State]:
    """Return the states that are meant, all that are allowed for None."""
    if states is None:
        return list(allowed)
    wanted: list[State] = []
    for state in [states] if isinstance(states, str) else states:
        if state not in allowed:
            raise InvalidOption(f"a state here is one of {', '.join(allowed)}, not {state!r}")
        wanted.append(State(state))
    if not wanted:
        raise InvalidOption("states must not be empty; leave it out for all")
    return wanted


def _checked_tags(tags: Iterable[str]) -> list[str]:
    wanted = list(checked_tags(tags))
    if not wanted:
        raise InvalidOption("tags must not be empty; leave it out for all")
    return wanted


def _require_filter(verb: str, given: Sequence[object], everything: bool) -> None:
    is_empty = all(value is None for value in given)
    if is_empty and not everything:
        raise InvalidOption(f"{verb} without a filter means all there are; say everything=True if that is wanted")
    if everything and not is_empty:
        raise InvalidOption("give a filter or everything=True, not both")

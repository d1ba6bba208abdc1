"""Waiting for results: many waiters, one LISTEN connection, no task of its own.

A flush that ends executions notifies only if somebody waits, and says which of 256 buckets (the id's last byte) it
touched. So a waiter first looks; if the execution has not finished, it raises flags (shared advisory locks: "somebody
waits", and one per bucket) on a connection that listens, and looks again. A flush that read the flags just before they
were raised is silent: the first looks after raising follow each other closely, later ones are a fallback. Notifications
are hints: with none delivered every result still arrives, after a poll.

The first waiter leads: it connects, listens and looks on behalf of all, and hands on to another when it leaves.
Invariants: one leader while anybody waits; the listening connection is used by the leader alone; nothing runs when
nobody waits (the connection rests without LISTEN and flags, or is closed). Looks use the pool, never that connection.
Cancellation: a leader cancelled while it naps hands its connection on; cancelled in mid-statement it closes it, and the
next leader connects anew. Nobody's result is lost: it stays in the database.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

import trio

from .db.calls import Calls
from .db.result_listener import ANYBODY, ResultListener, bucket_of
from .errors import Unavailable
from .model import Ended, Standing
from .outcomes import FINISHED, not_kept, outcome, unanswered_timeout
from .polling import MAX_BACKOFF, PollSchedule, Reconnecting
from .tasks import Task
from .verbs import Ask, Verbs, follow

R = TypeVar("R")

_LOOK_TIMEOUT = 10.0
_LAST_LOOK_TIMEOUT = 2.0
_CONNECT_TIMEOUT = 3.0  # looks wait for it: a listener that cannot connect must not delay polls for longer
_REST_TIMEOUT = 1.0
_SURPLUS_FLAGS = 32  # flags nobody needs any more are lowered together
_NAMED_STANDINGS = 100
_LOG_INTERVAL = 1.0

logger = logging.getLogger("pgconductor.results")


@dataclass(slots=True, eq=False)
class _Waiter:
    """One call of `wait`. `woken` is set when it has ended, is gone, or is to lead."""

    execution_id: UUID
    woken: trio.Event = field(default_factory=trio.Event)
    ended: Ended | None = None
    is_gone: bool = False

    @property
    def is_done(self) -> bool:
        return self.ended is not None or self.is_gone


@dataclass(slots=True, eq=False)
class _Awaited:
    """An execution that somebody waits for. Times are Trio's."""

    id: UUID
    waiters: dict[_Waiter, None] = field(default_factory=dict[_Waiter, None])
    looks: int = 0
    next_look: float = -math.inf
    flagged_at: float = math.inf
    is_named: bool = False


class Results:
    """Waits for results on Trio, for one conductor while it is open."""

    def __init__(self, calls: Calls, verbs: Verbs, conninfo: str, ask: Ask, schedule: PollSchedule) -> None:
        self._calls = calls
        self._verbs = verbs
        self._conninfo = conninfo
        self._ask = ask
        self._schedule = schedule
        self._awaited: dict[UUID, _Awaited] = {}
        self._leader: _Waiter | None = None
        self._nap_scope: trio.CancelScope | None = None
        self._sweep_at = -math.inf
        self._has_looked = False
        self._is_closed = False
        self._listener: ResultListener | None = None  # awake while there is a leader that uses it
        self._resting: ResultListener | None = None
        self._reconnecting = Reconnecting()
        self._logged_at = -math.inf

    async def wait(self, execution_id: UUID, task: Task[..., R], timeout: float | None) -> R:
        """Return the result, or raise as `Handle.result`. `timeout`: seconds; 0 looks once, None waits without end."""
        ended: Ended | None = None
        try:
            if timeout != 0:
                with trio.move_on_after(math.inf if timeout is None else timeout):
                    ended = await self._wait_ended(execution_id, task)
            if self._leader is None:
                await self._rest()
        except BaseException:
            if self._leader is None:
                self._drop_listener()
            raise
        if ended is None:
            ended = await self._look_last(execution_id, task, timeout)
        return outcome(task, ended)

    async def aclose(self) -> None:
        """Close the connection; whoever still waits gets the error of a conductor that is not open."""
        self._is_closed = True
        for awaited in self._awaited.values():
            awaited.next_look = -math.inf
        self._interrupt_nap()
        if self._resting is not None:
            self._resting.drop()
            self._resting = None
        if self._leader is None:
            self._drop_listener()
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def _look_last(self, execution_id: UUID, task: Task[..., Any], timeout: float | None) -> Ended:
        with trio.move_on_after(_LAST_LOOK_TIMEOUT):
            return await follow(self._verbs.last_look(task, execution_id, timeout), self._ask)
        raise unanswered_timeout(task, execution_id, timeout)

    async def _wait_ended(self, execution_id: UUID, task: Task[..., Any]) -> Ended:
        waiter = _Waiter(execution_id)
        self._join(waiter)
        try:
            while not waiter.is_done:
                if self._leader is waiter:
                    await self._pump(waiter)
                else:
                    await waiter.woken.wait()
        finally:
            self._leave(waiter)
        if waiter.ended is None:
            raise not_kept(task, execution_id)
        return waiter.ended

    # Who waits and who leads: synchronous, so that nobody sees a state in between

    def _join(self, waiter: _Waiter) -> None:
        awaited = self._awaited.get(waiter.execution_id)
        if awaited is None:
            awaited = self._awaited[waiter.execution_id] = _Awaited(waiter.execution_id)
            self._interrupt_nap()  # the leader is to look for this one too
        awaited.waiters[waiter] = None
        if self._leader is None:
            self._leader = waiter

    def _leave(self, waiter: _Waiter) -> None:
        if (awaited := self._awaited.get(waiter.execution_id)) is not None:
            awaited.waiters.pop(waiter, None)
            if not awaited.waiters:
                del self._awaited[waiter.execution_id]
        if self._leader is waiter:
            self._leader = next((w for a in self._awaited.values() for w in a.waiters), None)
            if self._leader is not None:
                self._leader.woken.set()

    def _deliver(self, awaited: _Awaited, ended: Ended | None) -> None:
        self._awaited.pop(awaited.id, None)
        for waiter in awaited.waiters:
            waiter.ended = ended
            waiter.is_gone = ended is None
            waiter.woken.set()

    def _interrupt_nap(self) -> None:
        if self._nap_scope is not None:
            self._nap_scope.cancel()

    def _drop_listener(self) -> None:
        if self._listener is not None:
            self._listener.drop()
            self._listener = None

    # The leader's work

    async def _pump(self, waiter: _Waiter) -> None:
        """Listen and look for all, until this waiter is done."""
        while not waiter.is_done:
            now = trio.current_time()
            if any(awaited.next_look <= now for awaited in self._awaited.values()):
                await self._raise_flags()
                await self._look()
            else:
                await self._nap(min(awaited.next_look for awaited in self._awaited.values()))

    async def _nap(self, until: float) -> None:
        """Wait for a notification, for a new waiter, or until the next look is due."""
        listener = self._listener
        try:
            with trio.CancelScope(deadline=until) as self._nap_scope:
                if listener is None:
                    await trio.sleep_forever()
                else:
                    self._note_named(await listener.receive())
        except Unavailable as error:
            self._lose_listener(error)
        finally:
            self._nap_scope = None

    def _note_named(self, buckets: set[int] | None) -> None:
        for awaited in self._awaited.values():
            if buckets is None or bucket_of(awaited.id) in buckets:
                awaited.next_look = -math.inf
                awaited.is_named = True

    async def _raise_flags(self) -> None:
        """See that there is a listener, with the flags of all that were looked for in vain."""
        unfinished = [awaited for awaited in self._awaited.values() if awaited.looks]
        if not unfinished:
            return
        wanted = {ANYBODY, *(bucket_of(awaited.id) for awaited in unfinished)}
        flags: set[int] = set() if self._listener is None else set(self._listener.flags)
        if wanted <= flags and len(flags - wanted) < _SURPLUS_FLAGS:
            return
        if self._listener is None and trio.current_time() < self._reconnecting.at:
            return
        try:
            with trio.move_on_after(_CONNECT_TIMEOUT) as scope:
                if self._listener is None:
                    self._listener = await self._open_listener()
                await self._listener.set_flags(wanted)
        except Unavailable as error:
            self._lose_listener(error)
            return
        except BaseException:
            self._drop_listener()
            raise
        if scope.cancelled_caught:
            self._lose_listener(TimeoutError(f"no answer within {_CONNECT_TIMEOUT:g} s"))
            return
        now = trio.current_time()
        for awaited in unfinished:
            if bucket_of(awaited.id) not in flags:  # what ended before the flag was raised was not announced
                awaited.flagged_at = now
                awaited.next_look = -math.inf

    async def _open_listener(self) -> ResultListener:
        resting, self._resting = self._resting, None
        if resting is not None:
            try:
                if await resting.wake():
                    return resting
            except Unavailable:
                pass  # it broke while it rested: connect anew
            except BaseException:
                resting.drop()
                raise
            resting.drop()
        return await ResultListener.open(self._calls, self._conninfo)

    async def _look(self) -> None:
        """Look for all that are due, in one statement, and set the time of their next look."""
        now = trio.current_time()
        due = [awaited for awaited in self._awaited.values() if awaited.next_look <= now]
        if not due:
            return
        try:
            with trio.fail_after(_LOOK_TIMEOUT):
                found = await self._read_results([awaited.id for awaited in due])
                missing = [a for a in due if a.id not in found and a.looks > 1]
                if len(missing) > _NAMED_STANDINGS:
                    missing = [awaited for awaited in missing if not awaited.is_named]
                standings = await self._read_standing([a.id for a in missing]) if missing else {}
        except (Unavailable, trio.TooSlowError) as error:
            if not self._has_looked:
                if isinstance(error, Unavailable):
                    raise
                raise Unavailable(f"the database did not answer within {_LOOK_TIMEOUT:g} s; try again later") from error
            self._log("cannot look for results, and try again: %s", error)
            for awaited in due:
                awaited.next_look = self._schedule.deaf_until(trio.current_time())
            return
        self._has_looked = True
        if self._sweep_at <= now:
            self._sweep_at = self._schedule.sweep_after(now)
        for awaited in due:
            awaited.looks += 1
            awaited.is_named = False
            awaited.next_look = self._next_look(awaited, now)
            standing = standings.get(awaited.id)
            if (ended := found.get(awaited.id)) is not None:
                self._deliver(awaited, ended)
            elif standing is not None and standing.state is None:
                self._deliver(awaited, None)
            elif standing is not None and standing.state in FINISHED:
                awaited.next_look = -math.inf  # finished between the two statements

    def _next_look(self, awaited: _Awaited, looked_at: float) -> float:
        if awaited.looks == 1:
            return -math.inf  # once more, with flags
        flagged_at = None if self._listener is None else awaited.flagged_at
        return self._schedule.next_look(looked_at, flagged_at, self._sweep_at)

    def _lose_listener(self, error: Exception) -> None:
        """Go on without a listener, and connect anew: at once if it had lasted, else after a growing while."""
        now = trio.current_time()
        had_lasted = self._listener is not None and self._listener.age > MAX_BACKOFF
        self._drop_listener()
        self._log("the connection that listens for results is lost; polling until it is back: %s", error)
        self._reconnecting.note_loss(now, had_lasted=had_lasted)
        for awaited in self._awaited.values():
            awaited.next_look = min(awaited.next_look, max(now, self._reconnecting.at), self._schedule.deaf_until(now))

    async def _rest(self) -> None:
        """Let the connection rest, since nobody waits any more; close it if that does not go quickly."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        is_resting = False
        try:
            with trio.move_on_after(_REST_TIMEOUT):
                await listener.rest()
                is_resting = True
        except Unavailable:
            pass  # the result is there; the next waiter connects anew
        finally:
            if is_resting and self._resting is None and not self._is_closed:
                self._resting = listener
            else:
                listener.drop()

    async def _read_results(self, ids: list[UUID]) -> dict[UUID, Ended]:
        return await self._ask(self._verbs.results(ids))

    async def _read_standing(self, ids: list[UUID]) -> dict[UUID, Standing]:
        return await self._ask(self._verbs.standing(ids))

    def _log(self, message: str, error: Exception) -> None:
        now = trio.current_time()
        if now - self._logged_at >= _LOG_INTERVAL:
            self._logged_at = now
            logger.warning(message, error)

"""Transactional steps: what the user's code writes, and the record that it did, commit together.

The function form calls the function with a connection, in an open transaction; the last statement before COMMIT saves
the step's record for the claim. A claim that was revoked is told so by that statement, and everything is rolled back; a
record that is there already likewise. So the effects are there exactly if the record is, and a replay, which finds the
record, does not call the function.

The block form gives the connection to a block, which Python cannot skip: see `db/tape.py` for how it runs again.

When the answer to COMMIT is lost, the database is asked what is recorded; that look waits for the lock which the
transaction holds until it has ended, so its answer is final. A function is called again if nothing is; the attempt of a
block is given back.

Cancellation: before the function or block has ended, everything is rolled back. Then record and commit run in a bounded
shield, as a step's value is written. All the time an operation is active, so that nothing is suspended.
"""

from __future__ import annotations

import functools
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, cast

import trio

from .codec import ResultCodec
from .durable import (
    LAST_WORDS,
    Durable,
    Revoked,
    Saved,
    Tries,
    TriesLike,
    checked_retry,
    inside_step,
    returned,
    step_timeout,
    until_unwound,
    value_codec,
)
from .errors import DurableMisuse, InvalidOption, NonDeterminism, Unavailable, Verdict
from .failpoints import failpoint
from .model import ISOLATIONS, Isolation
from .options import checked_seconds
from .retry import Fixed, checked_backoff, decide

if TYPE_CHECKING:
    from .db.tape import Tape
    from .db.transactions import OpenTransaction, Transactions

MAX_HITCHES: Final = 20  # rivals, and connections that broke, before they count as failures

_NO_PAUSE: Final = Fixed(0.0)
_ANY: ResultCodec[Any] = ResultCodec("block", Any, kind_of_value="record of a")


class _Hitch(Exception):
    """Nothing was committed, and the function is not to blame; the cause is what happened. Never leaves this module."""


class _Unknown(Exception):
    """It may have been committed, or a record is there already. Never leaves this module."""


def _checked_isolation(isolation: object) -> Isolation:
    """Return an isolation level; raises `InvalidOption`."""
    for level in ISOLATIONS:
        if isolation == level:
            return level
    raise InvalidOption(f"isolation= is one of {', '.join(map(repr, ISOLATIONS))}, not {isolation!r}")


def checked_terms(
    what: str, timeout: float | timedelta | None, isolation: object, retry: object, *, is_block: bool
) -> tuple[float | None, Isolation]:
    """Return the timeout in seconds and the isolation level of a transactional step, in either kind of handler.

    Raises `InvalidOption`, and `DurableMisuse` for a block that is to be tried again.
    """
    if is_block and retry is not None:
        raise DurableMisuse(f"{what}: a block cannot be run again by it: retry= needs the function form")
    seconds = None if timeout is None else checked_seconds("a transaction's timeout", timeout, minimum=0.001)
    return seconds, _checked_isolation(isolation)


async def run_transaction(
    durable: Durable,
    name: str,
    fn: Callable[..., Any],
    args: Sequence[object],
    retry: TriesLike,
    timeout: float | None,
    isolation: Isolation,
) -> Any:
    """See `Context.transaction`: the function form."""
    what = f"ctx.transaction({name!r})"
    policy = checked_retry(retry)
    with durable.operation(what):
        codec = value_codec(name, fn, durable.limits)
        history = await durable.history()
        record = history.begin(name, "transaction", alone=durable.is_alone)
        cause: BaseException | None = None
        if record is None:
            await durable.admit(name, "transaction")
            step = _Step(durable, name, "transaction", history.place(), isolation)
            saved, cause = await step.run(fn, args, codec, policy, timeout)
        else:
            await trio.lowlevel.checkpoint()
            saved = Saved(record.value, record.error)
    return returned(name, saved, codec, cause)


@asynccontextmanager
async def open_block(durable: Durable, name: str, timeout: float | None, isolation: Isolation) -> AsyncGenerator[Any]:
    """See `Context.transaction`: the block form."""
    what = f"ctx.transaction({name!r})"
    with durable.operation(what):
        history = await durable.history()
        record = history.begin(name, "block", alone=durable.is_alone)
        if record is None:
            await durable.admit(name, "block")
            step = _Step(durable, name, "block", history.place(), isolation)
            async with step.block(timeout) as conn:
                yield conn
        elif record.error is not None:
            returned(name, Saved(None, record.error), _ANY, None)  # raises StepFailed
        else:
            async with _replayed_block(durable, name, record.value or "[]", isolation) as conn:
                yield conn


class _Step:
    """One transactional step that is not recorded yet."""

    def __init__(self, durable: Durable, name: str, kind: str, position: int, isolation: Isolation) -> None:
        self._durable = durable
        self._name = name
        self._kind = kind
        self._position = position
        self._isolation: Isolation = isolation
        self._transactions = _required(durable)
        self._hitches = 0

    async def run(
        self,
        fn: Callable[..., Any],
        args: Sequence[object],
        codec: ResultCodec[Any],
        policy: Tries,
        timeout: float | None,
    ) -> tuple[Saved, BaseException | None]:
        """Call the function until its transaction is committed, or no tries are left; return what is recorded."""
        backoff = checked_backoff("Tries(backoff=)", policy.backoff)
        rng = self._durable.rng
        tries = 0
        while True:
            try:
                return await self._try(fn, args, codec, timeout), None
            except _Unknown:
                if (saved := await self._look_up()) is not None:
                    return saved, None
                await self._pause()
                continue
            except _Hitch as hitch:
                if self._hitches < MAX_HITCHES:
                    await self._pause()
                    continue
                error = cast(Exception, hitch.__cause__)
            except (DurableMisuse, NonDeterminism):
                raise
            except Exception as raised:  # noqa: BLE001  # what a step raises is data
                error = raised
            tries += 1
            decision = decide(tries, policy.tries, backoff, rng, error)
            if decision.kind == "released":
                raise error  # Snooze: it has not failed
            if decision.kind == "failed":
                return await self._durable.save_failure(self._name, self._kind, error, decision.verdict)
            await trio.sleep(decision.delay)

    async def _try(
        self, fn: Callable[..., Any], args: Sequence[object], codec: ResultCodec[Any], timeout: float | None
    ) -> Saved:
        async with AsyncExitStack() as stack:
            transaction = await self._open(stack, None)
            try:
                call = functools.partial(fn, transaction.conn, *args)
                text = codec.encode(await self._durable.call_step(self._name, call, timeout))
            except Exception as error:
                if transaction.is_lost or self._transactions.is_rival(error):
                    raise _Hitch from error
                raise
            return await self._commit(transaction, text)

    @asynccontextmanager
    async def block(self, timeout: float | None) -> AsyncGenerator[Any]:
        """The first run of a block."""
        durable = self._durable
        failure: Exception | None = None
        verdict: BaseException | None = None
        try:
            async with AsyncExitStack() as stack:
                tape = self._transactions.tape(_words(self._name))
                transaction = await self.open_patiently(stack, tape)
                deadline = trio.current_time() + (math.inf if timeout is None else timeout)
                with inside_step(self._name), trio.CancelScope(deadline=deadline) as scope:
                    yield transaction.conn
                if scope.cancelled_caught:
                    raise step_timeout(self._name, timeout)
                await self._commit(transaction, tape.dump())
        except (DurableMisuse, NonDeterminism):
            raise
        except _Unknown:
            if await self._look_up() is None:
                await give_back(durable)
        except _Hitch as hitch:
            failure = cast(Exception, hitch.__cause__)
        except Exception as error:  # what a step raises is data
            decision = decide(1, 1, _NO_PAUSE, durable.rng, error)
            if decision.kind == "released":
                raise  # Snooze: it has not failed
            failure, verdict = error, decision.verdict
        if failure is not None:
            saved, cause = await durable.save_failure(self._name, self._kind, failure, verdict)
            returned(self._name, saved, _ANY, cause)  # raises StepFailed

    async def _open(self, stack: AsyncExitStack, tape: Tape | None) -> OpenTransaction:
        opening = self._transactions.open(_words(self._name), self._isolation, tape)
        try:
            return await stack.enter_async_context(opening)
        except Exception as error:
            if self._transactions.is_outage(error):
                raise _Hitch from error
            raise

    async def open_patiently(self, stack: AsyncExitStack, tape: Tape) -> OpenTransaction:
        while True:
            try:
                return await self._open(stack, tape)
            except _Hitch:
                if self._hitches >= MAX_HITCHES:
                    raise
            await self._pause()

    async def _commit(self, transaction: OpenTransaction, text: str) -> Saved:
        """Record and commit, in a bounded shield. Raises `_Hitch`, `_Unknown`, or what makes it fail."""
        saved: Saved | None = None
        is_revoked = False
        scope = trio.CancelScope(deadline=trio.current_time() + LAST_WORDS, shield=True)
        try:
            with scope:
                await transaction.end_statements()
                saved = await self._durable.journal.save_step_inside(
                    transaction, self._name, self._kind, self._position, text
                )
                if saved is not None:
                    failpoint("transaction.before_commit")
                    await transaction.commit()
                    failpoint("transaction.committed")
        except Revoked:
            is_revoked = True
        except (DurableMisuse, NonDeterminism):
            raise
        except Exception as error:
            if transaction.is_lost and transaction.is_commit_sent:
                raise _Unknown from error
            if transaction.is_lost or isinstance(error, Unavailable) or self._transactions.is_rival(error):
                raise _Hitch from error
            raise
        if is_revoked:
            await until_unwound()
        if scope.cancelled_caught:
            await trio.lowlevel.checkpoint()  # the usual case: cancelled
            if transaction.is_commit_sent:
                raise _Unknown
            raise _Hitch from TimeoutError(f"{_words(self._name)} could not be committed within {LAST_WORDS:g} s")
        if saved is None:
            raise _Unknown
        return saved

    async def _look_up(self) -> Saved | None:
        record = await self._durable.look_up(self._name)
        return None if record is None else Saved(record.value, record.error)

    async def _pause(self) -> None:
        self._hitches += 1
        await trio.sleep(self._durable.rng.uniform(0.0, min(2.0, 0.002 * 2.0**self._hitches)))


@asynccontextmanager
async def _replayed_block(durable: Durable, name: str, recorded: str, isolation: Isolation) -> AsyncGenerator[Any]:
    """A block that was committed runs again, and is told what it was told."""
    if durable.transactions is None:
        await durable.admit(name, "block")  # a replay check has no connection to run it on
    tape = _required(durable).tape(_words(name), recorded)
    step = _Step(durable, name, "block", 0, isolation)
    is_lost = False
    try:
        async with AsyncExitStack() as stack:
            transaction = await step.open_patiently(stack, tape)
            try:
                with inside_step(name):
                    yield transaction.conn
            except (DurableMisuse, Verdict):
                raise
            except Exception as error:
                if not transaction.is_lost:
                    raise NonDeterminism(
                        f"the block of {_words(name)} was committed, and raises at its replay: {error!r}"
                    ) from error
                is_lost = True
            else:
                tape.finish()
    except _Hitch as hitch:
        raise cast(Exception, hitch.__cause__) from None
    if is_lost:
        await give_back(durable)


async def give_back(durable: Durable) -> None:
    """End the attempt, at no cost: it runs again from its history."""
    durable.suspender.give_way()
    await until_unwound()


def _required(durable: Durable) -> Transactions:
    if durable.transactions is None:
        raise DurableMisuse("ctx.transaction() needs the orchestrator's connections, and there are none here")
    return durable.transactions


def _words(name: str) -> str:
    return f"ctx.transaction({name!r})"

"""The history of a durable execution while its handler runs: which names were used, and what each had recorded.

Pure: records go in as the database told them, what a handler asks for goes in as a name and a kind, and the record of
the former run comes out, or None if the handler has come further than any run before. Names are unique within a run,
whatever the kind, and history is found by name alone, never by order: branches that run beside each other may come in
any order.

Only where nothing runs beside the handler is the order known too: what it asks for must then be the next that was
recorded in this attempt, and if it is something new although there are such records, the code has changed, or decides
by something that is not recorded. That is told before any harm is done (`NonDeterminism`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, NoReturn

from .codec import printable
from .errors import DurableMisuse, NonDeterminism
from .model import Record
from .options import checked_text

MAX_RECORDS: Final = 100_000
MAX_NAME_BYTES: Final = 128
_SHOWN: Final = 20


class History:
    """See the module's description. `attempt`: of the run that goes on."""

    def __init__(self, records: Iterable[Record], attempt: int) -> None:
        self._records = {record.name: record for record in records}
        self._attempt = attempt
        self._used: dict[str, str] = {}  # names of this run, with their kinds
        self._position = max((record.position for record in self._records.values()), default=-1)
        self._was_concurrent = False
        mine = (record for record in self._records.values() if record.attempt == attempt)
        self._due = deque(sorted(mine, key=lambda record: record.position))  # what is to be asked for, in order

    def __len__(self) -> int:
        return len(self._records)

    def begin(self, name: str, kind: str, *, alone: bool, target: str | None = None) -> Record | None:
        """Use a name; return what was recorded under it, None if this is new.

        `alone`: nothing runs beside the handler. `target`: what a wait is for, compared where the record has one.

        Raises `DurableMisuse` for a name that was used before in this run or is none, `NonDeterminism`.
        """
        checked_text(f"the name of a {kind}", name, max_bytes=MAX_NAME_BYTES)
        if name in self._used:
            raise DurableMisuse(
                f"the name {name!r} was used before in this run, for a {self._used[name]}; in a loop, number them: "
                f"f'{printable(name)}-{{n}}'"
            )
        record = self._records.get(name)
        self._used[name] = kind
        self._was_concurrent = self._was_concurrent or not alone
        if record is None:
            if not self._was_concurrent and (missed := self._missed()):
                self._diverged(f"asks for {kind} {name!r}, where {missed.kind} {missed.name!r} was recorded")
            if len(self._used) > MAX_RECORDS:
                raise DurableMisuse(
                    f"an execution has at most {MAX_RECORDS:,} records; invoke children, or continue as new"
                )
            return None
        if record.kind != kind:
            self._diverged(f"asks for {kind} {name!r}, which was recorded as a {record.kind}")
        if target is not None and record.target is not None and record.target != target:
            self._diverged(f"asks for {kind} {name!r} with {target!r}, which was recorded with {record.target!r}")
        return record

    def begin_scope(self, name: str) -> None:
        """Use the name of a nursery, which has no record of its own. Raises `DurableMisuse`."""
        checked_text("the name of a nursery", name, max_bytes=MAX_NAME_BYTES - 20)
        if name in self._used:
            raise DurableMisuse(f"the name {name!r} was used before in this run, for a {self._used[name]}")
        self._used[name] = "nursery"
        self._was_concurrent = True

    def place(self) -> int:
        """The position of a new record: later than all there are."""
        self._position += 1
        return self._position

    def get(self, name: str) -> Record | None:
        """What was recorded under a name, whether it has been asked for or not."""
        return self._records.get(name)

    def note(self, record: Record) -> None:
        """A record of this run, or what became of one."""
        self._records[record.name] = record

    def open_names(self, kind: str) -> list[str]:
        """The names of open waits of this kind."""
        return [r.name for r in self._records.values() if r.kind == kind and r.outcome is None]

    def unused(self) -> list[Record]:
        """Records of this attempt that the run has not asked for. A patch is none: it may be asked for no more, when
        all executions have it.
        """
        return [record for record in self._due if record.name not in self._used and record.kind != "patch"]

    def has_unasked(self) -> bool:
        """Whether there is anything, of whatever attempt, that this run has not asked for: it has gone on from here
        before.
        """
        return any(r.name not in self._used and r.kind != "patch" for r in self._records.values())

    def asked(self) -> list[str]:
        """What this run has asked for, in words and in order."""
        return [f"{kind} {name!r}" for name, kind in self._used.items()]

    def has_failed_child(self, scope: str) -> bool:
        """Whether a child of this nursery is known to have ended otherwise than by completing."""
        # A child that was waited for by itself has a scope of its own, named as it is.
        own = f"{scope}/"
        return any(
            r.outcome not in (None, "completed")
            and (r.scope == scope or (r.scope == r.name and r.name.startswith(own)))
            for r in self._records.values()
        )

    def _missed(self) -> Record | None:
        """The first record of this attempt that has not been asked for."""
        while self._due and self._due[0].name in self._used:
            self._due.popleft()
        return self._due[0] if self._due else None

    def _diverged(self, what: str) -> NoReturn:
        recorded = [in_words(r) for r in sorted(self._records.values(), key=lambda r: r.position)]
        asked = self.asked()
        error = NonDeterminism(
            f"the handler does not do again what it did: it {what}. Recorded: {_listed(recorded)}. "
            f"Asked for in this run: {_listed(asked)}. Give changed steps new names behind ctx.patched(), or the task "
            f"a new version"
        )
        error.recorded, error.asked = tuple(recorded), tuple(asked)
        raise error


def in_words(record: Record) -> str:
    """A record by its kind and name."""
    return f"{record.kind} {record.name!r}"


def _listed(words: list[str]) -> str:
    if len(words) <= _SHOWN:
        return ", ".join(words) or "nothing"
    return f"{', '.join(words[: _SHOWN // 2])}, ... ({len(words):,} in all), {', '.join(words[-_SHOWN // 2 :])}"

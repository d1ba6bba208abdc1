"""The LISTEN connection: lost, half-open, refused, deaf. Executions start all the same, at the latest with the sweep.

Where a test says that something came by NOTIFY, its sweep is off; where it says that it came by the sweep, that is
short, and bounds are those of a slow machine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import pytest
import trio
from runtime.workplace import Workplace, insert, is_flag_up, listeners_pids, scalar, session, until

from pgconductor.db.call import Call
from pgconductor.runtime import listener as listener_module
from pgconductor.testing.proxy import open_chaos_proxy

SWEEP = 0.4
UNLISTEN: Call[bool | None] = Call(b"unlisten *", (), lambda _: None)


async def test_killed_listener_listens_again_looks_once_and_is_notified_again(pgconductor_dsn: str) -> None:
    """A listener that gives up, or forgets to raise the flag again, leaves the queue to its sweep for good."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn) as admin:
        async with place.open():
            for n in range(3):
                await worker.until_asleep()
                claims = worker.pipeline.statistics().claims
                (pid,) = listeners_pids(admin)
                admin.execute("select pg_terminate_backend(%s)", [pid])
                await until(lambda: place.listeners[0].statistics().reconnects > len(place.started_at))
                await until(lambda: worker.is_asleep and worker.reactor.statistics().is_flag_raised)
                assert worker.pipeline.statistics().claims > claims
                assert is_flag_up(admin)
                assert pid not in listeners_pids(admin)
                insert(admin, n)
                await place.until_started(n)
            assert worker.reactor.statistics().notifications == 3


async def test_commit_between_reconnect_and_listen_needs_no_sweep(
    pgconductor_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It notified nobody. Looking once before LISTEN instead of after it would leave it to the sweep."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    link = place.listeners[0]._link
    listen = link.listen
    connected, go_on = trio.Event(), trio.Event()

    async def held_listen(channels: Iterable[str]) -> None:
        connected.set()
        await go_on.wait()
        await listen(channels)

    with session(pgconductor_dsn) as admin:
        async with place.open():
            await worker.until_asleep()
            monkeypatch.setattr(link, "listen", held_listen)
            admin.execute("select pg_terminate_backend(%s)", listeners_pids(admin))
            await until(connected.is_set)
            await until(lambda: worker.is_asleep and not worker.reactor.can_be_woken)
            insert(admin, 1)
            assert 1 not in place.started_at
            go_on.set()
            await place.until_started(1)
            assert worker.reactor.statistics().notifications == 0


async def test_with_all_notifications_dropped_nothing_starts_later_than_one_sweep(pgconductor_dsn: str) -> None:
    """NOTIFY is a hint; a queue that depended on it would stall with a pooler in between."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker(sweep_interval=SWEEP)
    worker.reactor._wakes_on_notify = lambda: False
    late: list[float] = []
    with session(pgconductor_dsn) as admin:
        async with place.open():
            for n in range(6):
                await worker.until_asleep()
                begun = trio.current_time()
                insert(admin, n)
                await place.until_started(n)
                late.append(place.started_at[n] - begun)
            assert worker.reactor.statistics().notifications == 0
    assert max(late) <= SWEEP + 5.0, late


async def test_half_open_connection_is_found_by_the_probe_and_the_sweep_carries_on(
    pgconductor_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket looks alive for ever: only a notification of its own that does not come back tells."""
    monkeypatch.setattr(listener_module, "_TIMEOUT", 1.0)
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        place = Workplace(pgconductor_dsn, listen_dsn=proxy.dsn, probe_interval=0.3)
        worker = place.worker(sweep_interval=SWEEP)
        listener = place.listeners[0]
        with session(pgconductor_dsn) as admin:
            async with place.open():
                await until(lambda: listener.statistics().probes >= 1)
                rtt = listener.statistics().probe_rtt
                assert rtt is not None
                assert 0 < rtt < 1.0
                begun = trio.current_time()
                proxy.blackhole(*listeners_pids(admin))
                insert(admin, 1)
                await place.until_started(1)
                await until(lambda: listener.statistics().reconnects == 1)
                assert trio.current_time() - begun >= 0.3  # not by the socket's own doing
                assert trio.current_time() - begun <= 0.3 + 1.0 + 5.0
                worker.reactor._sweep_interval = 3600.0
                await until(lambda: worker.is_asleep and worker.reactor.statistics().is_flag_raised)
                notifications = worker.reactor.statistics().notifications
                insert(admin, 2)
                await place.until_started(2)
                assert worker.reactor.statistics().notifications > notifications


async def test_lost_registration_is_found_by_the_probe(pgconductor_dsn: str) -> None:
    """The connection is alive and deaf, as behind a pooler that handed it to somebody else in between."""
    place = Workplace(pgconductor_dsn, probe_interval=0.2)
    worker = place.worker()
    listener = place.listeners[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listener_module, "_TIMEOUT", 1.0)
        with session(pgconductor_dsn) as admin:
            async with place.open():
                await worker.until_asleep()
                await listener.ask(UNLISTEN, lambda _: None)
                await until(lambda: listener.statistics().reconnects >= 1)
                await until(lambda: worker.is_asleep and worker.reactor.statistics().is_flag_raised)
                insert(admin, 1)
                await place.until_started(1)


async def test_refused_listener_leaves_one_line_a_second_and_the_sweep(
    pgconductor_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten queues that log every attempt would fill a disk (30,000 lines in 20 s were seen elsewhere)."""
    caplog.set_level(logging.INFO, logger="pgconductor")
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        place = Workplace(pgconductor_dsn, listen_dsn=proxy.dsn)
        workers = [place.worker(f"q{n}", sweep_interval=SWEEP) for n in range(5)]
        with session(pgconductor_dsn) as admin:
            async with place.open():
                begun = trio.current_time()
                proxy.refuse()
                proxy.rst()
                await until(lambda: sum(listener.statistics().reconnects for listener in place.listeners) >= 25)
                for n, worker in enumerate(workers):
                    insert(admin, n, queue=worker.queue)
                await place.until_started(*range(5))
                lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
                assert 1 <= len(lines) <= 1 + (trio.current_time() - begun)
                assert all(not worker.reactor.can_be_woken for worker in workers)
                await proxy.mend()
                for worker in workers:
                    worker.reactor._sweep_interval = 3600.0
                await until(lambda: all(worker.reactor.can_be_woken for worker in workers))


async def test_listener_that_is_refused_from_the_start_does_not_hold_up_the_worker(pgconductor_dsn: str) -> None:
    """A listen_dsn that does not answer costs latency, not the service."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        listen_dsn = proxy.dsn
        proxy.refuse()
        place = Workplace(pgconductor_dsn, listen_dsn=listen_dsn)
        place.worker(sweep_interval=SWEEP)
        with session(pgconductor_dsn) as admin:
            async with place.open():
                insert(admin, 1)
                await place.until_started(1)


async def test_worker_whose_listener_goes_while_it_looks_sleeps_until_the_sweep(pgconductor_dsn: str) -> None:
    """It went on looking four times a second for as long as the connection stayed away."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        place = Workplace(pgconductor_dsn, listen_dsn=proxy.dsn)
        worker = place.worker()
        stop = worker.stop_at("before look")
        async with place.open():
            await stop.until_reached()
            proxy.refuse()
            proxy.rst()
            await until(lambda: not worker.reactor.can_be_woken)
            stop.resume.set()
            await worker.until_asleep()


async def test_killed_listener_in_mode_always_raises_its_flag_again(pgconductor_dsn: str) -> None:
    """The flag went with its session; until it is up again producers notify nobody."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker(notify="always")
    with session(pgconductor_dsn) as admin:
        async with place.open():
            await worker.until_asleep()
            admin.execute("select pg_terminate_backend(%s)", listeners_pids(admin))
            await until(lambda: place.listeners[0].statistics().reconnects == 1)
            await until(lambda: worker.reactor.statistics().is_flag_raised)
            await worker.until_asleep()
            assert is_flag_up(admin)
            insert(admin, 1)
            await place.until_started(1)


async def test_forged_and_garbage_notifications_cost_a_claim_and_nothing_else(pgconductor_dsn: str) -> None:
    """Any role may notify any channel with any payload: it is a reason to look, never something to read."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn) as admin:
        channel = scalar(admin, "select pgconductor._private_channel(%s)", "q")
        async with place.open():
            await worker.until_asleep()
            claims = worker.pipeline.statistics().claims
            admin.execute("select pg_notify(%s, 'x' || n) from generate_series(1, 10000) n", [channel])
            await until(lambda: worker.reactor.statistics().notifications >= 1)
            await worker.until_asleep()
            insert(admin, 1)
            await place.until_started(1)
            # Those of one round trip are one wake-up: a few of them, not ten thousand.
            assert worker.pipeline.statistics().claims - claims < 1000

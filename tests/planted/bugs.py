"""The planted bugs: each takes one guard away, and names the tests that must notice.

A bug is a textual change of one file: `old` stands in it exactly `times` times (once unless said), and each is replaced
by `new`. `caught_by`: what pytest is given.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bug:
    """`guard` says in words what was taken away."""

    name: str
    guard: str
    file: str
    old: str
    new: str
    caught_by: tuple[str, ...]
    times: int = 1


_PARTITIONS = "sql/functions/09_partitions.sql"
_FLEET = "sql/functions/07_fleet.sql"
_CANCEL = "sql/functions/10_cancel.sql"
_WAKE = "sql/functions/02_wake.sql"
_INVOKE = "sql/functions/03_invoke.sql"
_FLUSH = "sql/functions/06_flush.sql"
_CLAIM = "sql/functions/05_claim.sql"
_QUEUES = "sql/functions/04_queues.sql"
_RETENTION = "sql/functions/11_retention.sql"
_DEAD = "sql/functions/12_dead_letters.sql"
_HISTORY = "sql/functions/15_history.sql"
_PARENT_GONE = "and g.parent_id <> all (array(select p.id from gone p where p.is_durable))"
_DURABLE = "src/pgconductor/durable.py"
_CHILDREN = "src/pgconductor/children.py"
_LEASE = "src/pgconductor/runtime/lease.py"
_FLUSHER = "src/pgconductor/runtime/flusher.py"
_WORKER = "src/pgconductor/runtime/worker.py"
_LISTENER = "src/pgconductor/runtime/listener.py"
_SUSPECTS = "src/pgconductor/runtime/suspects.py"
_LINK = "src/pgconductor/db/link.py"

_TOKEN = "(e.id, e.claim_no, e.owner, e.state) is not distinct from (o.id, o.claim_no, p_owner, 'running')"
_LOOK_AGAIN = "where (row.claim_no, row.owner, row.state) = (o.claim_no, p_owner, 'running')"

BUGS = (
    Bug(
        "flush-without-claim-no",
        "a flush tests the number of the claim",
        _PARTITIONS,
        _TOKEN,
        "(e.id, e.owner, e.state) is not distinct from (o.id, p_owner, 'running')",
        ("tests/sql/test_flush.py::test_wrong_token_changes_nothing",),
        times=2,
    ),
    Bug(
        "flush-without-owner",
        "a flush tests the owner of the claim",
        _PARTITIONS,
        _TOKEN,
        "(e.id, e.claim_no, e.state) is not distinct from (o.id, o.claim_no, 'running')",
        ("tests/sql/test_flush.py::test_wrong_token_changes_nothing",),
        times=2,
    ),
    Bug(
        "retry-without-state",
        "a retry tests that its execution is still running, so that it cannot revive what was given back",
        _PARTITIONS,
        "owner = null, claimed_at = null, outcome = o.outcome",
        "claimed_at = null, outcome = o.outcome",
        ("tests/sql/test_flush.py::test_claim_that_has_ended_cannot_end_again",),
    ),
    Bug(
        "flush-gives-up-at-a-changed-row",
        "a flush that meets a row which somebody changed and left to its owner looks again",
        _PARTITIONS,
        _LOOK_AGAIN,
        "where false and (row.claim_no, row.owner, row.state) = (o.claim_no, p_owner, 'running')",
        ("tests/sql/test_flush.py::test_flush_that_meets_a_change_which_leaves_the_claim_alone_is_written",),
    ),
    Bug(
        "flush-locks-in-the-order-given",
        "a flush locks its rows in the order of their ids",
        _PARTITIONS,
        "offset 0) row\n                order by o.id\n            ), slots",
        "offset 0) row\n            ), slots",
        ("tests/sql/test_flush.py::test_two_flushes_of_the_same_claims_in_other_orders_do_not_deadlock",),
    ),
    Bug(
        "retry-of-a-cancelled-one",
        "a requested cancellation ends an execution that would have been tried again",
        _PARTITIONS,
        "or e.cancel_requested_at is not null and o.outcome in ('retried', 'released', 'recovered', 'waiting'))",
        "or false)",
        ("tests/sql/test_cancel.py::test_what_was_asked_to_end_never_starts_again",),
    ),
    Bug(
        "key-kept-after-the-end",
        "the end of an execution frees its dedupe key",
        _PARTITIONS,
        "where g.dedupe_key is not null and d.queue",
        "where false and g.dedupe_key is not null and d.queue",
        ("tests/sql/test_dedupe.py::test_key_is_free_again_after_the_end",),
    ),
    Bug(
        "key-of-another-freed",
        "the end of an execution frees only the key that is its own",
        _PARTITIONS,
        "and d.key = g.dedupe_key and d.execution_id = g.id",
        "and d.key = g.dedupe_key",
        ("tests/sql/test_flush.py::test_end_of_one_execution_leaves_the_key_of_another",),
    ),
    Bug(
        "crash-charged-to-the-attempts",
        "a crash is not charged to the attempts",
        _PARTITIONS,
        "attempt = e.attempt - case when o.outcome = 'retried' then 0 else 1 end",
        "attempt = e.attempt - case when o.outcome in ('retried', 'recovered') then 0 else 1 end",
        ("tests/sql/test_fleet.py::test_what_a_dead_owner_held_comes_back",),
    ),
    Bug(
        "claim-without-k",
        "a claim holds K, so that a worker going to sleep knows that rows are hidden",
        _PARTITIONS,
        "    perform pg_advisory_xact_lock_shared(@schema@._private_key_k(p_queue));\n"
        "    perform set_config('synchronous_commit', 'off', true);",
        "    perform set_config('synchronous_commit', 'off', true);",
        ("tests/sql/test_wake.py::test_work_hidden_by_a_claimer_that_dies_is_seen",),
    ),
    Bug(
        "claim-by-anybody",
        "only a living, registered orchestrator may claim",
        _PARTITIONS,
        "    perform @schema@._private_require_alive(p_owner, v_now);\n\n    -- Not min()",
        "    -- Not min()",
        ("tests/sql/test_claim.py::test_only_a_living_registered_orchestrator_may_claim",),
    ),
    Bug(
        "claim-of-any-task",
        "a claim takes only tasks that its program has",
        _PARTITIONS,
        "select ctid from @schema@._private_queue_{no} where state = 'ready' and crashes < 2 and task = any (p_tasks)",
        "select ctid from @schema@._private_queue_{no} where state = 'ready' and crashes < 2",
        ("tests/sql/test_claim.py::test_claim_takes_only_tasks_the_worker_has",),
    ),
    Bug(
        "suspects-beside-innocents",
        "an execution on its last life is not claimed beside others",
        _PARTITIONS,
        "select ctid from @schema@._private_queue_{no} where state = 'ready' and crashes < 2 and task = any (p_tasks)",
        "select ctid from @schema@._private_queue_{no} where state = 'ready' and task = any (p_tasks)",
        ("tests/sql/test_lives.py::test_execution_on_its_last_life_is_claimed_by_itself_only",),
    ),
    Bug(
        "suspects-beside-innocents-of-two-partitions",
        "the same where some are in the overflow partition",
        _PARTITIONS,
        "from @schema@._private_queue_{no}\n            where state = 'ready' and crashes < 2 and",
        "from @schema@._private_queue_{no}\n            where state = 'ready' and",
        ("tests/sql/test_lives.py::test_execution_on_its_last_life_is_claimed_by_itself_only",),
    ),
    Bug(
        "claim-waits-for-rivals",
        "a claim skips what another claim has locked",
        _PARTITIONS,
        "order by priority desc, run_at, id limit p_limit for update skip locked\n        ), claimed as (",
        "order by priority desc, run_at, id limit p_limit for update\n        ), claimed as (",
        ("tests/sql/test_claim.py::test_claimers_skip_what_a_rival_has_locked",),
    ),
    Bug(
        "heartbeat-is-an-upsert",
        "a heartbeat never revives the dead",
        _FLEET,
        "where id = p_id and died_at is null and expires_at > v_now and server_epoch",
        "where id = p_id and server_epoch",
        ("tests/sql/test_fleet.py::test_heartbeat_never_revives",),
    ),
    Bug(
        "heartbeat-outlives-the-server",
        "after a restart of the server an orchestrator's claims may be lost, so its id is used no more",
        _FLEET,
        "and expires_at > v_now and server_epoch = @schema@._private_server_epoch();",
        "and expires_at > v_now;",
        ("tests/faults/test_guards.py::test_heartbeat_and_claim_are_refused_to_who_registered_with_the_server_before",),
    ),
    Bug(
        "recovery-from-the-orchestrators",
        "recovery starts from the executions, so that it finds those of owners nobody knows any more",
        _FLEET,
        "where w.owner is not null and (o.id is null or o.died_at is not null)",
        "where w.owner is not null and o.died_at is not null",
        ("tests/sql/test_fleet.py::test_what_a_dead_owner_held_comes_back",),
    ),
    Bug(
        "outage-charged-as-a-crash",
        "claims that an outage of the server ended are not charged with a crash",
        _FLEET,
        "case when o.server_epoch <> @schema@._private_server_epoch() then 0 else 1 end",
        "1",
        ("tests/sql/test_lives.py::test_outage_of_the_server_is_no_crash_of_those_who_lost_their_lease_by_it",),
    ),
    Bug(
        "recovery-of-the-living",
        "recovery leaves the executions of living orchestrators alone",
        _FLEET,
        "where o.died_at is null and case\n            when o.expires_at <= v_now then true",
        "where o.died_at is null and case\n            when true then true",
        ("tests/sql/test_fleet.py::test_heartbeat_keeps_a_lease_alive",),
    ),
    Bug(
        "crash-loop-goes-on",
        "an execution that brought down three processes is failed",
        _FLEET,
        "case when crashes + $4 >= 3 and cancel_requested_at is null then 'failed'",
        "case when crashes + $4 >= 300 and cancel_requested_at is null then 'failed'",
        ("tests/sql/test_fleet.py::test_execution_that_brings_down_its_process_three_times_fails",),
    ),
    Bug(
        "recovery-of-locked-rows",
        "recovery skips rows that their owner is writing",
        _FLEET,
        "where state = 'running' and owner = $1 and queue = $2 limit $3 for update skip locked) x",
        "where state = 'running' and owner = $1 and queue = $2 limit $3 for update) x",
        ("tests/sql/test_fleet.py::test_recovery_skips_rows_another_holds",),
    ),
    Bug(
        "early-rescue-of-a-living-session",
        "an orchestrator is rescued before its lease only when its session is gone",
        _FLEET,
        "when o.has_session and o.heartbeat_at < v_now - (o.expires_at - o.heartbeat_at) / 2",
        "when o.heartbeat_at < v_now - (o.expires_at - o.heartbeat_at) / 2",
        ("tests/sql/test_lives.py::test_orchestrator_without_a_session_of_its_own_has_its_whole_lease",),
    ),
    Bug(
        "succession-takes-any-claim",
        "after a restart only claims that are still there are handed over",
        _FLEET,
        "where e.id = h.id and e.claim_no = h.claim_no and e.owner = $1",
        "where e.id = h.id and e.owner = $1",
        ("tests/faults/test_guards.py::test_succession_takes_no_claim_of_another_number",),
    ),
    Bug(
        "cancel-without-lock",
        "cancelling waits for a claim in flight of the same rows, and sees what it did",
        _CANCEL,
        "where id = any ($1) order by id for update) x",
        "where id = any ($1) order by id) x",
        ("tests/faults/test_guards.py::test_cancel_that_waits_for_a_claim_asks_its_owner",),
    ),
    Bug(
        "cancel-locks-in-another-order",
        "cancelling locks rows in the order of their ids, as a flush does",
        _CANCEL,
        "where id = any ($1) order by id for update) x",
        "where id = any ($1) order by id desc for update) x",
        ("tests/faults/test_guards.py::test_cancel_and_flush_of_the_same_rows_do_not_deadlock",),
    ),
    Bug(
        "first-reason-overwritten",
        "whoever cancels a second time does not change the reason",
        _CANCEL,
        "where id = any ($1) and state = 'running' and cancel_requested_at is null",
        "where id = any ($1) and state = 'running'",
        ("tests/sql/test_cancel.py::test_what_runs_is_left_to_its_owner_who_is_told",),
    ),
    Bug(
        "cancelled-one-not-told",
        "the owner of a running execution is told of its cancellation at once",
        _CANCEL,
        "perform @schema@._private_notify(@schema@._private_control_channel(o), '') from unnest(v_owners) as o;",
        "",
        ("tests/sql/test_cancel.py::test_what_runs_is_left_to_its_owner_who_is_told",),
    ),
    Bug(
        "insert-without-k",
        "an insert raises K before it looks whether anybody sleeps",
        _WAKE,
        "if (case when pg_try_advisory_xact_lock_shared(@schema@._private_key_k(p_queue))\n"
        "            then @schema@._private_nobody_sleeps(p_queue) else false end) then",
        "if @schema@._private_nobody_sleeps(p_queue) then",
        ("tests/sql/test_wake.py::test_worker_looking_at_this_instant_is_taken_for_asleep",),
    ),
    Bug(
        "notify-into-a-full-queue",
        "no NOTIFY where it would fail at commit and take its transaction with it",
        _WAKE,
        "if pg_notification_queue_usage() < 0.9 then",
        "if true then",
        (
            "tests/faults/test_limits_of_the_server.py::test_full_notification_queue_stops_neither_producers_nor_workers",
        ),
    ),
    Bug(
        "invoke-acknowledged-too-early",
        "an invoke commits durably, whatever the default is",
        _INVOKE,
        "perform set_config('synchronous_commit', 'on', true);",
        "perform 1;",
        ("tests/faults/test_server.py::test_acknowledged_invokes_survive_crashes_of_the_server",),
    ),
    Bug(
        "slot-emptied-unchecked",
        "a slot whose bound was lowered once is looked into before it is emptied",
        _RETENTION,
        "v_slot.no, v_slot.must_check, v_now",
        "v_slot.no, false, v_now",
        ("tests/sql/test_retention.py",),
    ),
    Bug(
        "slot-emptied-early",
        "a slot is emptied when its bound has passed",
        _RETENTION,
        "s.expires_upto < v_now and isfinite",
        "s.expires_upto < v_now + interval '1 h' and isfinite",
        ("tests/sql/test_retention.py",),
    ),
    Bug(
        "maintenance-by-many",
        "one session at a time maintains",
        _RETENTION,
        "lock_held := pg_try_advisory_xact_lock(@schema@._private_key_maintenance());",
        "lock_held := true;",
        ("tests/sql/test_retention.py",),
    ),
    Bug(
        "far-slot-for-ever",
        "the far slot is closed, and emptied sometime",
        _RETENTION,
        "elsif v_spare is not null and",
        "elsif false and v_spare is not null and",
        ("tests/sql/test_retention.py",),
    ),
    Bug(
        "maintenance-waits-for-readers",
        "maintenance waits for a reader a tenth of a second at most",
        _RETENTION,
        "    set lock_timeout = '100ms'\n",
        "",
        ("tests/sql/test_retention.py",),
    ),
    Bug(
        "slot-with-earlier-bound",
        "a flush takes a slot that is emptied after the row's expiry",
        _RETENTION,
        "expires_upto >= p_now + make_interval(secs => p_keep)",
        "expires_upto >= p_now + make_interval(secs => p_keep * 0.9)",
        ("tests/sql/test_retention.py",),
    ),
    Bug(
        "maintenance-takes-what-is-retried",
        "maintenance skips rows that a retry has locked",
        _RETENTION,
        "limit $1 for update skip locked",
        "limit $1",
        ("tests/sql/test_dead_letters.py",),
    ),
    Bug(
        "retry-keeps-the-dead-row",
        "a retry removes the finished row in the same statement",
        _DEAD,
        "with gone as (\n        delete from @schema@._private_finished f where f.id = any (v_free) returning *",
        "with gone as (\n        select * from @schema@._private_finished f where f.id = any (v_free)",
        ("tests/sql/test_dead_letters.py",),
    ),
    Bug(
        "retry-makes-a-twin",
        "a retry leaves alone what a live execution's key keeps dead",
        _DEAD,
        "f.id <> all (v_held) and",
        "",
        ("tests/sql/test_dead_letters.py",),
    ),
    Bug(
        "retry-keeps-the-key-of-the-gone",
        "a retry that finds its row gone gives the key back",
        _DEAD,
        "delete from @schema@._private_dedupe_keys d where d.execution_id",
        "delete from @schema@._private_dedupe_keys d where false and d.execution_id",
        ("tests/sql/test_dead_letters.py",),
    ),
    Bug(
        "retry-reuses-claim-numbers",
        "a retried execution counts its claims on",
        _DEAD,
        "g.progress, g.claim_no, g.state::text, g.claim_no, v_now",
        "g.progress, 0, g.state::text, 0, v_now",
        ("tests/sql/test_dead_letters.py",),
    ),
    Bug(
        "retry-drops-steps",
        "a retried execution has its steps again",
        _DEAD,
        "lateral jsonb_to_recordset(g.steps)",
        "lateral jsonb_to_recordset('[]')",
        ("tests/sql/test_dead_letters.py",),
    ),
    Bug(
        "pages-by-time-only",
        "pages of dead letters go on behind the last id of an instant",
        _DEAD,
        "(f.finished_at, f.id) < (",
        "(f.finished_at, null::uuid) < (",
        ("tests/sql/test_dead_letters.py",),
    ),
    Bug(
        "retry-by-filter-stops-at-the-held",
        "a filter passes over those whose key is taken",
        _DEAD,
        "f.dedupe_key is null or not exists",
        "true or not exists",
        ("tests/sql/test_dead_letters.py",),
    ),
    Bug(
        "trust-beyond-the-lease",
        "a lease is relied on for less than others wait",
        _LEASE,
        "return lease - min(1.5, 0.2 * lease)",
        "return lease + min(1.5, 0.2 * lease)",
        ("tests/runtime/test_lease.py::test_trust_ends_before_others_may_take_over",),
    ),
    Bug(
        "statement-after-the-lease",
        "nothing is sent under an id whose lease is over",
        _LEASE,
        '        if not self.is_held():\n            raise LeaseLost("the lease is over")\n',
        "",
        ("tests/runtime/test_lease.py::test_lease_that_is_over_sends_nothing",),
    ),
    Bug(
        "clock-looked-at-once",
        "the lease's clock is looked at often, since Trio's stands still while the machine is suspended",
        _LEASE,
        "await trio.sleep(min(longest, self._ends_at - self.clock()))",
        "await trio.sleep(self._ends_at - self.clock())",
        ("tests/runtime/test_lease.py::test_suspended_machine_finds_its_lease_over_though_trio_slept_no_longer",),
    ),
    Bug(
        "hand-over-without-waiting",
        "a new id is taken only when no call under the old one is in flight",
        _LEASE,
        "            if self._inside:\n                self._is_empty = trio.Event()",
        "            if False:\n                self._is_empty = trio.Event()",
        ("tests/runtime/test_lease.py::test_hand_over_waits_for_the_replies_of_calls_in_flight",),
    ),
    Bug(
        "outcome-forgotten-before-the-answer",
        "an outcome is kept until the database has answered for it",
        _FLUSHER,
        "        if refused is None:\n            return\n        # Whoever",
        "        refused = refused or {}\n        # Whoever",
        ("tests/faults/test_ambiguous.py::test_lost_flush_or_claim_costs_no_run_and_no_second_end",),
    ),
    Bug(
        "lost-claim-forgotten",
        "after a claim whose reply was lost, what we do not know of is given back",
        _WORKER,
        "self._reconcile_at[:] = [now, now + 31.0]",
        "self._reconcile_at[:] = [now + 3100.0]",
        ("tests/faults/test_ambiguous.py::test_lost_flush_or_claim_costs_no_run_and_no_second_end",),
    ),
    Bug(
        "stock-kept-at-a-stop",
        "what was claimed and has not begun goes back at once",
        _WORKER,
        "                                self._is_stopping = True\n                                self._give_back_stock()",
        "                                self._is_stopping = False",
        ("tests/faults/test_processes.py::test_terminated_process_gives_back_what_it_has_not_begun",),
    ),
    Bug(
        "suspect-beside-innocents",
        "while an execution on its last life runs, nothing else begins in the process",
        _SUSPECTS,
        "self._starts.is_held = True",
        "self._starts.is_held = False",
        ("tests/faults/test_guards.py::test_nothing_begins_beside_an_execution_on_its_last_life",),
    ),
    Bug(
        "listen-after-the-sweep",
        "after a reconnect: LISTEN first, then one look",
        _LISTENER,
        "        await self._listen_to(*self._channels, self._probe_channel)\n"
        "        # Up first: whoever is woken now, while the next flag is being raised, must see that it can be woken again.\n"
        "        self._is_up = True\n"
        "        for subscriber in self._subscribers.values():\n"
        "            await subscriber.on_listening()\n",
        "        self._is_up = True\n"
        "        for subscriber in self._subscribers.values():\n"
        "            await subscriber.on_listening()\n"
        "        await self._listen_to(*self._channels, self._probe_channel)\n",
        ("tests/faults/test_guards.py::test_notification_sent_while_the_queues_look_once_is_heard",),
    ),
    Bug(
        "administrators-isolation",
        "the engine's transactions are READ COMMITTED whatever the default is",
        _LINK,
        '    "default_transaction_isolation": "read committed",\n',
        "",
        ("tests/faults/test_settings.py::test_default_isolation_level_of_the_database_changes_nothing",),
    ),
    Bug(
        "administrators-time-limits",
        "the engine's sessions have time limits of their own",
        _LINK,
        '    "idle_session_timeout": "0",\n',
        "",
        ("tests/faults/test_settings.py::test_time_limits_of_the_administrator_do_not_reach_the_engine",),
    ),
    Bug(
        "outage-is-an-error",
        "a server without room is waited for",
        _LINK,
        '_TRANSIENT_CLASSES = ("08", "40", "53", "57", "58")',
        '_TRANSIENT_CLASSES = ("08", "40", "57", "58")',
        ("tests/faults/test_limits_of_the_server.py::test_full_disk_costs_time_and_no_finished_result",),
    ),
    Bug(
        "publish-beside-holders",
        "a queue is published when nobody can have an old list of partitions",
        _QUEUES,
        " and not holders && v_holders",
        " and holders is not null",
        ("tests/sql/test_register_queue.py::test_queue_is_published_when_nobody_can_have_an_old_list",),
    ),
    Bug(
        "batch-into-unpublished",
        "a batch goes into the partitions of published queues only",
        _INVOKE,
        " and q.published <= v_published",
        "",
        ("tests/sql/test_register_queue.py::test_queue_is_published_when_nobody_can_have_an_old_list",),
        times=2,
    ),
    Bug(
        "invoke-into-unpublished",
        "an execution goes into the partition of a published queue only",
        _INVOKE,
        " and q.published is not null",
        "",
        ("tests/sql/test_register_queue.py::test_queue_is_published_when_nobody_can_have_an_old_list",),
    ),
    Bug(
        "records-without-claim-no",
        "a step or wait is recorded by the claim that runs",
        _PARTITIONS,
        "(e.claim_no, e.owner, e.state) is not distinct from (o.claim_no, p_owner, 'running') offset 0",
        "(e.owner, e.state) is not distinct from (p_owner, 'running') offset 0",
        ("tests/sql/test_records.py::test_who_does_not_hold_the_claim_records_and_learns_nothing",),
    ),
    Bug(
        "records-without-owner",
        "a step or wait is recorded by the claim's owner",
        _PARTITIONS,
        "(e.claim_no, e.owner, e.state) is not distinct from (o.claim_no, p_owner, 'running') offset 0",
        "(e.claim_no, e.state) is not distinct from (o.claim_no, 'running') offset 0",
        ("tests/sql/test_records.py::test_who_does_not_hold_the_claim_records_and_learns_nothing",),
    ),
    Bug(
        "records-unmarked",
        "an execution with records is marked, so that its end keeps and removes them",
        _PARTITIONS,
        "set is_durable = true from held h where e.id = h.id and not h.is_durable",
        "set is_durable = true from held h where e.id = h.id and false",
        ("tests/sql/test_families.py::test_parent_and_child_that_end_by_one_flush_leave_nothing_behind",),
    ),
    Bug(
        "step-overwritten",
        "a step that is there stays as it is",
        _HISTORY,
        "        on conflict do nothing\n        returning execution_id, name",
        "        on conflict (execution_id, name) do update set value = excluded.value\n        returning execution_id, name",
        ("tests/sql/test_records.py::test_step_that_is_saved_again_stays_what_it_was_first",),
    ),
    Bug(
        "children-nest-without-end",
        "children are nested to a limit",
        _HISTORY,
        "where (w.kind <> 'child' or h.depth < 16)",
        "where (w.kind <> 'child' or h.depth < 1600)",
        ("tests/sql/test_records.py::test_children_are_nested_to_a_limit",),
    ),
    Bug(
        "park-without-a-second-look",
        "whoever parks an execution looks at what was resolved before",
        _PARTITIONS,
        "if 'waiting' = any (p_outcomes) then",
        "if false then",
        ("tests/sql/test_records.py::test_end_of_a_child_makes_its_parent_ready_whenever_it_parks",),
    ),
    Bug(
        "park-charged-to-the-attempts",
        "to wait costs no attempt",
        _PARTITIONS,
        "attempt = e.attempt - case when o.outcome = 'retried' then 0 else 1 end",
        "attempt = e.attempt - case when o.outcome in ('retried', 'waiting') then 0 else 1 end",
        ("tests/sql/test_records.py::test_end_of_a_child_makes_its_parent_ready_whenever_it_parks",),
    ),
    Bug(
        "wake-without-the-parents-lock",
        "who ends a child holds its parent's row, so that the parent parks before it or after it",
        _HISTORY,
        "    v_ids := p_ids || v_parents;",
        "    v_ids := p_ids;",
        ("tests/sql/test_pairs.py::test_two_verbs_at_once_end_as_one_after_the_other[family-park-complete_child]",),
    ),
    Bug(
        "flush-beside-a-record",
        "a flush begins when whoever records for one of its rows has committed",
        _FLUSH,
        "if p_family or v_goes_on then",
        "if false then",
        ("tests/sql/test_pairs.py::test_two_verbs_at_once_end_as_one_after_the_other[family-park-start_waits]",),
    ),
    Bug(
        "wake-for-each-child",
        "a parent of a scope is woken by the last child, or the first that fails",
        _HISTORY,
        "where e.id = any ($1) and e.state = 'waiting' and @schema@._private_is_resumable(e.id)",
        "where e.id = any ($1) and e.state = 'waiting'",
        ("tests/sql/test_records.py::test_parent_of_a_scope_waits_for_the_last_child_or_the_first_failure",),
    ),
    Bug(
        "told-and-told-again",
        "a wait is told once, and wakes nobody after that",
        _HISTORY,
        "set is_seen = true where w.execution_id = any (p_ids) and w.resolved_at is not null and not w.is_seen",
        "set is_seen = true where false and w.execution_id = any (p_ids)",
        ("tests/sql/test_records.py::test_what_was_told_wakes_nobody_again",),
    ),
    Bug(
        "sleepers-sleep-on",
        "a claim makes those ready whose wait is due",
        _CLAIM,
        "where state in ('scheduled', 'waiting') and run_at <= $1",
        "where state in ('scheduled') and run_at <= $1",
        ("tests/sql/test_records.py::test_sleeper_is_claimed_when_its_time_has_come_and_not_before",),
    ),
    Bug(
        "child-resolved-by-its-namesake",
        "a wait is resolved by its own child",
        _PARTITIONS,
        "                    and w.target = g.id::text and w.resolved_at is null\n",
        "                    and w.resolved_at is null\n",
        ("tests/sql/test_records.py::test_child_of_a_former_life_resolves_nothing",),
    ),
    Bug(
        "grandchildren-left",
        "whoever is cancelled takes its children along",
        _CANCEL,
        "            where w.on_close = 'cancel' and w.resolved_at is null\n",
        "            where false and w.on_close = 'cancel' and w.resolved_at is null\n",
        ("tests/sql/test_records.py::test_descendants_end_with_their_parent_or_go_on_as_they_were_told",),
    ),
    Bug(
        "abandoned-cancelled",
        "children that were abandoned go on",
        _PARTITIONS,
        "                where w.on_close = 'cancel' and w.resolved_at is null\n",
        "                where w.on_close is not null and w.resolved_at is null\n",
        ("tests/sql/test_records.py::test_descendants_end_with_their_parent_or_go_on_as_they_were_told",),
    ),
    Bug(
        "wait-of-a-dead-parent-resolved",
        "of a parent and a child that end by one flush the waits go",
        _PARTITIONS,
        _PARENT_GONE,
        "",
        ("tests/sql/test_families.py::test_parent_and_child_that_end_by_one_flush_leave_nothing_behind",),
    ),
    Bug(
        "wait-of-a-cancelled-parent-resolved",
        "the same where they are cancelled by one call",
        _CANCEL,
        _PARENT_GONE,
        "",
        ("tests/sql/test_families.py::test_parent_and_child_cancelled_by_one_call_leave_nothing_behind",),
    ),
    Bug(
        "retry-keeps-the-last-failures",
        "failures that nothing came after are tried again with the next attempt",
        _PARTITIONS,
        "if v_retried <> '{}' then",
        "if false then",
        ("tests/sql/test_families.py::test_parent_that_goes_on_is_told_of_the_child_that_ends_beside_it",),
    ),
    Bug(
        "failures-forgotten-by-a-zombie",
        "only the claim that runs has failures forgotten",
        _PARTITIONS,
        "where o.outcome = 'retried' and row.is_durable and (row.claim_no, row.owner, row.state) = (o.claim_no, p_owner, 'running'));",
        "where o.outcome = 'retried' and row.is_durable);",
        ("tests/sql/test_families.py::test_flush_that_is_sent_again_forgets_nothing_that_came_after_it",),
    ),
    Bug(
        "cut-while-a-step-runs",
        "nothing is given up while an operation is active",
        _DURABLE,
        "        self._active += 1\n        self._stir()\n        try:\n            yield\n        finally:\n"
        "            self._active -= 1\n",
        "        self._stir()\n        try:\n            yield\n        finally:\n",
        ("tests/faults/test_durable.py::test_step_beside_a_parked_branch_runs_to_its_end",),
    ),
    Bug(
        "parking-cancels-children",
        "an unwinding that the engine began leaves children alone",
        _DURABLE,
        "if names and not self.suspender.is_unwinding:",
        "if names:",
        ("tests/faults/test_durable.py::test_parked_parent_leaves_its_children_alone",),
    ),
)

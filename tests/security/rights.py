"""Who may do what, as it was decided: the list that the catalogue is compared with.

Not made from the SQL's own list on purpose. Whoever adds an object to the schema decides here who may use it, or that
nobody may.
"""

from __future__ import annotations

P, W, V, O = "producer", "worker", "viewer", "operator"  # noqa: E741  # as in the table of docs/security.md

# Functions by name, with all their forms; "_N" is a partition's number. What is not named, is for the owner alone.
CALLS: dict[str, set[str]] = {
    "invoke": {P, W},
    "invoke_many": {P, W},
    "cancel": {P, W, O},  # of producers and workers: what their login role has invoked
    "emit": {P, W, O},
    "send": {P, W, O},  # of producers and workers: to what their login role has invoked
    "resolve_promise": {P, W, O},  # by whoever has the id, which is a secret
    "reject_promise": {P, W, O},
    "results": {P, W},
    "progress": {P, W},
    "read_channel": {P, W},
    "standing": {P, W},
    "execution_errors": {P, W, V, O},
    "execution_details": {P, W, V, O},
    "execution_steps": {P, W, V, O},
    "_private_results_channel": {P, W},
    "_private_key_w": {P, W},
    "register_queue": {W},
    "publish_queues": {W},
    "register_tasks": {W},
    "register_orchestrator": {W},
    "hold_session": {W},
    "heartbeat": {W},
    "signals": {W},
    "succeed_orchestrator": {W},
    "retire_orchestrator": {W},
    "claim": {W},
    "_private_claim_N": {W},
    "claim_suspect": {W},
    "load_payload": {W},
    "flush": {W},
    "release_unknown": {W},
    "recover": {W},
    "save_effects": {W},
    "set_progress": {W},
    "open_channel": {W},
    "append_items": {W},
    "close_channel": {W},
    "deliver_events": {W},
    "_private_errands_channel": {W},
    "load_history": {W},
    "read_waits": {W},
    "save_steps": {W},
    "start_waits": {W},
    "request_close": {W},
    "close_children": {W},
    "maintain": {W},
    "drain_wait": {W},
    "stored_histories": {W},
    "continue_as_new": {W},
    "raise_sleep_flag": {W},
    "lower_sleep_flag": {W},
    "look_before_sleep": {W},
    "become_lookout": {W},
    "stand_down": {W},
    "_private_channel": {W},
    "_private_control_channel": {W},
    "queue_status": {V, O},
    "orchestrator_status": {V, O},
    "queue_load": {V, O},
    "_private_loaded_queues": {V, O},
    "dead_letters": {V, O},
    "list_executions": {V, O},
    "_private_doctor": {V, O},
    "cancel_matching": {O},
    "retry": {O},
    "retry_matching": {O},
    "fork": {O},
    "restart": {O},
    # The marks of the kinds: whoever may execute one, is of it.
    "_private_kind_producer": {P},
    "_private_kind_worker": {W},
    "_private_kind_viewer": {V},
    "_private_kind_operator": {O},
}

# Tables and views that may be read. Nothing may be written by anybody but the owner.
READS: dict[str, set[str]] = {
    "execution_status": {V, O},
    "autoscaling": {V, O},
    "_private_migrations": {P, W, V, O},
    "_private_schema": {P, W, V, O},
}

# Functions that run with the rights of the owner: whose every caller is trusted with what they do, and no more.
AS_OWNER = set(CALLS) - {
    "_private_results_channel",
    "_private_key_w",
    "_private_channel",
    "_private_control_channel",
    "_private_errands_channel",
    "_private_kind_producer",
    "_private_kind_worker",
    "_private_kind_viewer",
    "_private_kind_operator",
}

# Public verbs that nobody may call but the owner.
OWNER_ONLY = {"grant_role", "granted_roles", "revoke_role"}

# Views that show payloads, for the owner alone.
OWNER_READS = {"executions", "_private_records"}

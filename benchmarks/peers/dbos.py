"""DBOS (PyPI: dbos), with the defaults of its maker's benchmark of queues, dbos-inc/dbos-postgres-benchmark."""

from .peer import Package

DBOS = Package(
    name="DBOS",
    packages=("dbos",),
    program="dbos",
    settings={
        "sys_db_pool_size": 5,
        "max_executor_threads": 512,
        "worker_concurrency": 1000,
        "polling_interval_sec": 1.0,
    },
    unfinished_sql="select from dbos.workflow_status where status in ('ENQUEUED', 'PENDING', 'DELAYED')",
    outcome_sql="""
        select count(*), count(distinct workflow_uuid), count(*) filter (where status = 'SUCCESS'),
            sum(recovery_attempts), (select count(*) from dbos.operation_outputs where error is null),
            (max(completed_at) - min(started_at_epoch_ms)) / 1000.0
        from dbos.workflow_status
    """,
)

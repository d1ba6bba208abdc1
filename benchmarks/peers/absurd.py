"""Absurd (PyPI: absurd-sdk, absurdctl), its asynchronous client with the settings of its documentation's example."""

from .peer import Package

ABSURD = Package(
    name="Absurd",
    packages=("absurd-sdk", "absurdctl"),
    program="absurd",
    settings={"concurrency": 4, "claim_timeout": 120, "poll_interval": 0.25},
    unfinished_sql="select from absurd.t_default where state in ('pending', 'running', 'sleeping')",
    outcome_sql="""
        select count(*), count(distinct task_id), count(*) filter (where state = 'completed'),
            (select count(*) from absurd.r_default), (select count(*) from absurd.c_default),
            (select extract(epoch from max(completed_at) - min(started_at)) from absurd.r_default)
        from absurd.t_default
    """,
)

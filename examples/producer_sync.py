"""A producer without an event loop: a script, a web application under WSGI, a notebook. Needs `service.py` running.

export PGCONDUCTOR_DSN=postgresql://localhost/app
python producer_sync.py Ada Grace
"""

from __future__ import annotations

import sys

from service import conductor, greet

with conductor.sync() as client:
    names = sys.argv[1:] or ["World"]
    handles = client.invoke_many(greet, [greet.bind(name=name) for name in names])
    for handle in handles:
        print(handle.result(timeout=30))

    # By name, where the task's code is not at hand.
    print(client.invoke("resize", {"picture": "cat.png", "width": 640}, priority=10).result(timeout=30))

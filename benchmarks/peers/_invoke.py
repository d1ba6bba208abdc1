"""pgconductor's producer of no-op jobs: ``_invoke.py DSN SETTINGS``, on its blocking client; see `marks.pace`."""

from __future__ import annotations

import sys

from pgconductor import Conductor

from .marks import pace

with Conductor(sys.argv[1]).sync() as client:
    pace(lambda n: client.invoke("noop", {"n": n}, queue="noop"))

"""pgconductor beside public packages for durable workflows, in one run on one server: see `steps`."""

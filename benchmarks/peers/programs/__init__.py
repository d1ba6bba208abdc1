"""The peers' programs, in the way their own documentation shows. They run in an environment that has the peers and not
pgconductor, so they import nothing of this project; the type checkers leave them out, since they lack the peers."""

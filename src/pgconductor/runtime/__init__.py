"""The only package that keeps tasks running: reactor, worker, orchestrator."""

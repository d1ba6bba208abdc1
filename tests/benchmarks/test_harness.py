"""What all benchmarks share: plots that change only with what they show, and measures of what was used."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
from pathlib import Path

import psycopg
import pytest

from benchmarks import harness
from benchmarks.harness import Bench, CpuMeter, WaitSampler, cpu_seconds

_WORK = b"select sum(n) from generate_series(1, 3000000) n group by n % 7"  # a tenth of a second of CPU and more
_SERIES = {"1 queue": [(1.0, 10.0), (20.0, 12.5)], "4 queues": [(1.0, 11.0), (20.0, 30.0)]}


def test_plots_are_the_same_bytes_for_the_same_figures(tmp_path: Path) -> None:
    """Committed plots that change with each run hide in their noise the change that matters."""
    plots = pytest.importorskip("benchmarks.plots", reason="needs matplotlib: pip install 'pgconductor[bench]'")
    written: list[tuple[str, str]] = []
    for folder in (tmp_path / "1", tmp_path / "2"):
        folder.mkdir()
        plots.lines(folder / "lines.svg", title="Rate", x="workers", y="executions/s", series=_SERIES, log_x=True)
        plots.bars(folder / "bars.svg", title="Cost", y="µs", groups={"a": {"x": 1.0, "y": 2.0}, "b": {"y": 1234.0}})
        written.append(((folder / "lines.svg").read_text(), (folder / "bars.svg").read_text()))
    assert written[0] == written[1]
    lines, bars = written[0]
    assert all(f">{text}</text>" in lines for text in ("Rate", "workers", "executions/s", "4 queues", "20"))
    assert all(f">{text}</text>" in bars for text in ("Cost", "µs", "x", "y", "a", "b", "1,234"))


def test_missing_matplotlib_is_said_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of measuring that ends in an ImportError."""
    monkeypatch.delitem(sys.modules, "benchmarks.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delattr("benchmarks.plots", raising=False)
    options = argparse.Namespace(plot=Path("plots"), dsn="host=nowhere.invalid", json=None)
    with pytest.raises(SystemExit, match=r"--plot needs matplotlib: pip install 'pgconductor\[bench\]'"):
        harness.run("test", options, lambda _: pytest.fail("it measured"))


def test_cpu_of_processes_and_of_backends(bench: Bench) -> None:
    """CPU that is charged to nobody, or to the wrong side, sends the search for speed astray."""
    if cpu_seconds(os.getpid()) is None:
        pytest.skip("needs /proc, as Linux has")
    spin = "import time\nwhile time.process_time() < 0.3: pass\nprint(); input()"
    with bench.database() as database:
        looking, working = database.conn, psycopg.connect(database.dsn, autocommit=True)
        with working:
            if not database.local_backends():
                pytest.skip("the server's processes are not seen from here")
            meter = CpuMeter(database)
            looking.execute(_WORK)
            before = meter.server()
            working.execute(_WORK)
            after = meter.server()
        assert before is not None
        assert after is not None
        assert before < 0.05 < 0.1 < after
        with subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert (cpu_seconds(process.pid) or 0) >= 0.28
            process.communicate()
        assert cpu_seconds(process.pid) is None


def test_sampler_sees_who_waits_for_a_lock(bench: Bench) -> None:
    """Contention that the sampler overlooks would be advised away."""
    with bench.database() as database, psycopg.connect(database.dsn) as holder:
        holder.execute("select pg_advisory_xact_lock(7)")
        with psycopg.connect(database.dsn, autocommit=True) as waiter:
            waiting = threading.Thread(target=waiter.execute, args=("select pg_advisory_xact_lock(7)",))
            with WaitSampler(database, interval=0.001) as waits:
                waiting.start()
                while not waits.counts["Lock/advisory"] or not waits.counts["Client/ClientRead"]:
                    pass
                holder.rollback()
                waiting.join()
            assert 0 < waits.average("Lock") <= 1
            assert waits.counts["Lock/advisory"] <= waits.samples

"""The plan of failpoints: what is understood, what is refused, and at which arrival it happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pgconductor import failpoints
from pgconductor.failpoints import BadFailpoints, FailpointReached, Plan, make_failpoint, parse


def test_a_plan_is_understood() -> None:
    """A plan read differently from how it was written would kill at another place, or nowhere."""
    assert parse(" flush.answered=kill@2 ; claim.before=raise;outcome.noted=wait:/a@b/gate@13;flush.before=stop;") == {
        "flush.answered": Plan("kill", None, 2),
        "claim.before": Plan("raise", None, None),
        "outcome.noted": Plan("wait", Path("/a@b/gate"), 13),
        "flush.before": Plan("stop", None, None),
    }
    assert parse("") == {}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("flush.answered", "not POINT=ACTION"),
        ("flush.answered=explode", "not POINT=ACTION"),
        ("flush.answered=kill@0", "not POINT=ACTION"),
        ("flush.answered=kill@x", "not POINT=ACTION"),
        ("flush.answered=wait:", "not POINT=ACTION"),
        ("flush.anwsered=kill", "no point 'flush.anwsered'"),
        ("flush.answered=kill;flush.answered=stop", "given twice"),
    ],
)
def test_a_plan_that_would_test_nothing_is_refused(text: str, complaint: str) -> None:
    """A misspelt point is never reached: the test that planned it would pass whatever the engine does."""
    with pytest.raises(BadFailpoints, match=complaint):
        parse(text)


def test_the_k_th_arrival_alone_is_hit() -> None:
    """A kill at the first arrival instead of the fifth never sees what the fifth would."""
    reach = make_failpoint(parse("flush.before=raise@3;claim.before=raise"))
    reach("flush.before")
    reach("flush.before")
    reach("handler.before")
    with pytest.raises(FailpointReached, match=r"flush\.before"):
        reach("flush.before")
    reach("flush.before")
    for _ in range(2):
        with pytest.raises(FailpointReached, match=r"claim\.before"):
            reach("claim.before")


def test_a_waiting_point_tells_and_waits_for_its_file(tmp_path: Path) -> None:
    """A gate that did not hold, or that nobody could see reached, would make a race of every test that uses it."""
    gate = tmp_path / "gate"
    reach = make_failpoint(parse(f"claim.answered=wait:{gate}"))
    waiting = threading.Thread(target=reach, args=("claim.answered",))
    waiting.start()
    while not (tmp_path / "gate.reached").exists():
        pass
    assert waiting.is_alive()
    gate.touch()
    waiting.join(10)
    assert not waiting.is_alive()


def run(plan: str | None, program: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != failpoints.VARIABLE}
    if plan is not None:
        environment[failpoints.VARIABLE] = plan
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


REACH_TWICE = "from pgconductor.failpoints import failpoint as f; f('flush.before'); print('one'); f('flush.before')"


def test_the_environment_decides_at_import() -> None:
    """A process that planned nothing must not be able to die here; one that did dies by a real SIGKILL, no clean-up."""
    assert run(None, REACH_TWICE).returncode == 0
    killed = run("flush.before=kill@2", REACH_TWICE + "; print('two')")
    assert killed.returncode == -signal.SIGKILL
    assert "two" not in killed.stdout
    refused = run("flush.befor=kill", REACH_TWICE)
    assert refused.returncode == 1
    assert "there is no point 'flush.befor'" in refused.stderr


def test_without_a_plan_a_point_does_nothing() -> None:
    """The points are on the path of every execution: without a plan they must not even look."""
    program = "from pgconductor import failpoints as f; print(f.failpoint is f._nothing)"
    assert run(None, program).stdout.strip() == "True"

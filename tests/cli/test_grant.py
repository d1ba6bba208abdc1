"""`pgconductor grant`: rights given, taken and listed by command."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from security.site import Site, open_site
from typer.testing import CliRunner

from pgconductor import Conductor, Refused
from pgconductor.cli import app
from pgconductor.testing import Databases


@pytest.fixture
def site(pgconductor_databases: Databases) -> Iterator[Site]:
    """A database with roles of all kinds."""
    with pgconductor_databases.empty() as dsn, open_site(dsn) as site:
        yield site


def _run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}, prog_name="pgconductor")
    return result.exit_code, result.stdout, result.stderr


def test_rights_are_given_listed_and_taken(site: Site) -> None:
    """An option is parsed and does nothing, or --revoke gives."""
    one, two = site.new_role("one"), site.new_role("two\x1b[2J")
    owner = ("--dsn", site.dsn_of(site.owner))
    code, out, err = _run("grant", "--producer", one, "--producer", two, "--operator", two, *owner)
    assert (code, err) == (0, "")
    assert f"producer  {one}\n" in out
    assert "\x1b" not in out
    with Conductor(site.dsn_of(one)).sync() as client:
        client.invoke("t", {})
        with pytest.raises(Refused, match="role may not"):
            client.queue_status()
    code, out, _ = _run("grant", "--revoke", "--producer", one, "--json", *owner)
    answer = json.loads(out)
    assert (code, answer["schema"]) == (0, "pgconductor")
    assert {"role": two, "kind": "producer"} in answer["roles"]
    assert {"role": two, "kind": "operator"} in answer["roles"]
    assert one not in {entry["role"] for entry in answer["roles"]}
    with Conductor(site.dsn_of(one)).sync() as client, pytest.raises(Refused):
        client.invoke("t", {})
    code, again, _ = _run("grant", "--json", *owner)
    assert (code, json.loads(again)) == (0, answer)


def test_refusals_are_one_line_that_names_the_remedy(site: Site) -> None:
    """A role that is misspelt is a traceback, or nothing at all."""
    owner = ("--dsn", site.dsn_of(site.owner))
    code, out, err = _run("grant", "--worker", "no'body", *owner)
    assert (code, out) == (2, "")
    assert "there is no role 'no''body'" in err
    assert "CREATE ROLE" in err
    code, _, err = _run("grant", "--worker", "public", *owner)
    assert (code, "no role 'public'" in err) == (2, True)
    code, _, err = _run("grant", "--worker", site.role("viewer"), "--dsn", site.dsn_of(site.role("worker")))
    assert (code, "grant_role" in err) == (1, True)

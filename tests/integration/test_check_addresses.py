"""`check` looks where the registry says that servers are, and compares with what the settings say."""

from __future__ import annotations

import socket

from tests.world import PostgreSQLWorld


def test_check_names_a_server_that_does_not_answer_and_one_that_is_elsewhere(postgresql_world: PostgreSQLWorld) -> None:
    db = postgresql_world.make_db()
    known = db.servers.get("default")
    assert [finding.text for finding in db.check() if str(finding.severity) == "problem"] == []
    with socket.socket() as unused:  # bound and not listening: whoever connects is refused
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        db.servers.add("default", backend=known.backend, host="127.0.0.1", port=port)

        problems = [finding.text for finding in db.check() if str(finding.severity) == "problem"]

    assert len(problems) == 2
    assert f"nothing answers at 127.0.0.1:{port}" in problems[0]
    assert "different addresses" in problems[1]

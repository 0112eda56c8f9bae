"""What vouches for a task's tenant: whatever is changed about it, it does not hold."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenantdb.celery import stamps
from tenantdb.celery.stamps import EVERY_TENANT, Stamp, Stamps
from tenantdb.errors import TaskRefused

OLD, NEW = b"o" * 32, b"n" * 32
ACME = UUID(int=1)
NOW = 1_800_000_000
words = st.text(max_size=8)
scopes = st.one_of(st.uuids(), st.just(EVERY_TENANT))
some_stamps = st.builds(
    Stamp, scopes, st.integers(NOW - 99, NOW), actor=words, request_id=st.none() | words, waits=st.integers(min_value=0, max_value=9)
)
book = Stamps([NEW], max_age=100)


def travelled(header: dict[str, Any]) -> dict[str, Any]:
    back: dict[str, Any] = json.loads(json.dumps(header))
    return back


@given(some_stamps, words, words)
def test_a_stamp_comes_back_as_it_was_made(stamp: Stamp, task: str, task_id: str) -> None:
    assert book.verify(travelled(book.make(stamp, task, task_id)), task, task_id, now=NOW) == stamp


@given(some_stamps, some_stamps, words, words, words, words)
def test_a_stamp_with_any_part_of_another_does_not_hold(stamp: Stamp, other: Stamp, task: str, task_id: str, task2: str, id2: str) -> None:
    header, donor = book.make(stamp, task, task_id), book.make(other, task2, id2)
    for name in header:
        mixed = {**header, name: donor[name]}
        if mixed != header:
            with pytest.raises(TaskRefused, match="forged"):
                book.verify(mixed, task, task_id, now=NOW)
    if (task2, id2) != (task, task_id):
        with pytest.raises(TaskRefused, match="forged"):
            book.verify(header, task2, id2, now=NOW)


def test_name_and_id_do_not_run_into_each_other() -> None:
    header = book.make(Stamp(ACME, NOW), "ab", "c")

    with pytest.raises(TaskRefused, match="forged"):
        book.verify(header, "a", "bc", now=NOW)


@pytest.mark.parametrize(
    "header",
    [
        "tenant=acme",
        [],
        {},
        {"v": 2},
        {"mac": None},
        {"mac": "\udc80"},
        {"mac": ["x"]},
        {"at": "soon"},
        {"at": 1.5},
        {"tenant": None},
        {"tenant": {"$ne": 1}},
        {"waits": "many"},
        {"actor": None},
        {"key": 7},
    ],
)
def test_what_is_no_stamp_at_all_is_refused_and_breaks_nothing(header: Any) -> None:
    whole = book.make(Stamp(ACME, NOW), "t", "1")
    given = {**whole, **header} if isinstance(header, dict) and header else header

    with pytest.raises(TaskRefused):
        book.verify(given, "t", "1", now=NOW)
    assert book.verify(whole, "t", "1", now=NOW)  # the twin


def test_a_stamp_holds_for_max_age_from_its_moment_and_no_longer() -> None:
    header = book.make(Stamp(ACME, NOW), "t", "1")

    assert book.verify(header, "t", "1", now=NOW - 10**6)  # an eta far away
    assert book.verify(header, "t", "1", now=NOW + 100)
    with pytest.raises(TaskRefused, match="expired: it is 101 s old, and max_age is 100 s"):
        book.verify(header, "t", "1", now=NOW + 101)


def test_the_newest_key_signs_and_an_older_one_verifies_as_long_as_it_is_given() -> None:
    before, between, after = Stamps([OLD], max_age=100), Stamps([NEW, OLD], max_age=100), Stamps([NEW], max_age=100)
    old, new = (each.make(Stamp(ACME, NOW), "t", "1") for each in (before, between))

    assert between.verify(old, "t", "1", now=NOW)
    assert after.verify(new, "t", "1", now=NOW)
    for stamps_, header in ((after, old), (before, new)):
        with pytest.raises(TaskRefused, match="a key that is not here"):
            stamps_.verify(header, "t", "1", now=NOW)


def test_the_tenant_that_somebody_wrote_into_a_header_would_be_believed_if_nobody_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamps.hmac, "compare_digest", lambda *_: True)
    forged = {**book.make(Stamp(ACME, NOW), "t", "1"), "tenant": str(UUID(int=2))}

    assert book.verify(forged, "t", "1", now=NOW).scope == UUID(int=2)

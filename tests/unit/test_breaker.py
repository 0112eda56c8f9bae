"""The breaker: each way from one state to another, and everything that must not be one."""

from __future__ import annotations

import pytest

from tenantdb.connections.breaker import FIRST_PAUSE, LONGEST_PAUSE, PROBE_TIMEOUT, THRESHOLD, Breaker

MIDDLE = 0.5  # a spread that changes no pause
LEAST, MOST = 0.75, 1.25  # what the other spreads make of it


def opened(at: float = 0.0, *, spread: float = MIDDLE) -> Breaker:
    breaker = Breaker()
    for _ in range(THRESHOLD):
        breaker.failed(at, "nothing listens there", spread)
    assert breaker.is_open
    return breaker


# -- closed ----------------------------------------------------------------------------------------------------------------------------


def test_a_new_breaker_lets_everybody_through() -> None:
    breaker = Breaker()

    assert not breaker.is_open
    assert [breaker.refusal(now) for now in (0.0, 0.0, 1e9)] == [None, None, None]


def test_it_takes_so_many_failures_in_a_row_to_open_it_and_only_the_last_says_so() -> None:
    breaker = Breaker()

    said = [breaker.failed(float(number), "nothing listens there", MIDDLE) for number in range(THRESHOLD + 1)]

    assert said == [False] * (THRESHOLD - 1) + [True, False]


def test_below_the_threshold_nobody_is_refused() -> None:
    breaker = Breaker()
    for _ in range(THRESHOLD - 1):
        breaker.failed(0.0, "nothing listens there", MIDDLE)

    assert not breaker.is_open
    assert breaker.refusal(0.0) is None


def test_a_success_between_failures_starts_the_count_anew_and_is_no_news() -> None:
    breaker = Breaker()
    for _ in range(10):
        for _ in range(THRESHOLD - 1):
            assert breaker.failed(0.0, "nothing listens there", MIDDLE) is False
        assert breaker.succeeded() is False

    assert not breaker.is_open


def test_who_gave_up_has_neither_failed_nor_succeeded() -> None:
    breaker = Breaker()
    for _ in range(100):
        breaker.gave_up()
    assert not breaker.is_open

    for _ in range(THRESHOLD - 1):
        breaker.failed(0.0, "nothing listens there", MIDDLE)
    breaker.gave_up()
    assert breaker.failed(0.0, "nothing listens there", MIDDLE) is True  # the row was not broken


# -- open ------------------------------------------------------------------------------------------------------------------------------


def test_while_it_is_open_everybody_gets_the_last_failure_at_once() -> None:
    breaker = Breaker()
    for problem in ("it did not answer in time", "it is starting up", "nothing listens there"):
        breaker.failed(10.0, problem, MIDDLE)

    assert [breaker.refusal(10.0 + FIRST_PAUSE * part) for part in (0.0, 0.5, 0.99)] == ["nothing listens there"] * 3


@pytest.mark.parametrize(("spread", "factor"), [(0.0, LEAST), (0.5, 1.0), (1.0, MOST)])
def test_processes_do_not_probe_in_step(spread: float, factor: float) -> None:
    breaker = opened(10.0, spread=spread)
    due = 10.0 + FIRST_PAUSE * factor

    assert breaker.refusal(due - 0.001) is not None
    assert breaker.refusal(due) is None


# -- half open -------------------------------------------------------------------------------------------------------------------------


def test_after_the_pause_one_probe_is_let_through_and_everybody_else_is_refused() -> None:
    breaker = opened(0.0)

    assert breaker.refusal(FIRST_PAUSE) is None
    assert [breaker.refusal(FIRST_PAUSE) for _ in range(100)] == ["nothing listens there"] * 100
    assert breaker.is_open


def test_a_probe_that_comes_through_closes_it_and_says_so_once() -> None:
    breaker = opened(0.0)
    assert breaker.refusal(FIRST_PAUSE) is None

    assert breaker.succeeded() is True

    assert not breaker.is_open
    assert breaker.succeeded() is False
    assert [breaker.refusal(FIRST_PAUSE) for _ in range(10)] == [None] * 10


def test_each_probe_that_fails_doubles_the_pause_up_to_a_bound() -> None:
    breaker, now, pauses = opened(0.0), 0.0, [FIRST_PAUSE]
    for _ in range(10):
        now += pauses[-1]
        assert breaker.refusal(now - 0.001) is not None
        assert breaker.refusal(now) is None
        assert breaker.failed(now, "nothing listens there", MIDDLE) is False  # it was open: no news
        pauses.append(min(LONGEST_PAUSE, 2 * pauses[-1]))

    assert pauses[-1] == LONGEST_PAUSE
    assert breaker.refusal(now + LONGEST_PAUSE * 0.99) is not None
    assert breaker.refusal(now + LONGEST_PAUSE) is None


def test_a_breaker_that_was_closed_begins_with_the_first_pause_again() -> None:
    breaker = opened(0.0)
    for now in (1.0, 2.0, 4.0):
        breaker.refusal(now)
        breaker.failed(now, "nothing listens there", MIDDLE)
    breaker.succeeded()

    for _ in range(THRESHOLD):
        breaker.failed(100.0, "nothing listens there", MIDDLE)

    assert breaker.refusal(100.0 + FIRST_PAUSE * 0.99) is not None
    assert breaker.refusal(100.0 + FIRST_PAUSE) is None


def test_a_probe_that_gave_up_leaves_its_place_to_the_next_at_once() -> None:
    breaker = opened(0.0)
    assert breaker.refusal(FIRST_PAUSE) is None

    breaker.gave_up()  # cancelled, or refused for a reason that is its tenant's

    assert breaker.is_open
    assert breaker.refusal(FIRST_PAUSE) is None
    assert breaker.refusal(FIRST_PAUSE) is not None


def test_a_probe_of_which_nothing_is_heard_is_not_waited_for_for_ever() -> None:
    breaker = opened(0.0)
    assert breaker.refusal(FIRST_PAUSE) is None

    assert breaker.refusal(FIRST_PAUSE + PROBE_TIMEOUT - 0.001) is not None
    assert breaker.refusal(FIRST_PAUSE + PROBE_TIMEOUT) is None
    assert breaker.refusal(FIRST_PAUSE + PROBE_TIMEOUT) is not None


def test_a_connect_from_before_it_opened_may_close_it() -> None:
    breaker = opened(0.0)

    assert breaker.succeeded() is True  # the server is there, whoever found out

    assert breaker.refusal(0.0) is None


def test_asking_whether_one_would_be_refused_does_not_use_up_the_probe() -> None:
    breaker = Breaker()
    assert breaker.would_refuse(0.0) is None
    for _ in range(THRESHOLD):
        breaker.failed(0.0, "nothing listens there", spread=0.5)
    assert breaker.would_refuse(0.0) == "nothing listens there"
    assert breaker.would_refuse(100.0) is None
    assert breaker.refusal(100.0) is None  # the probe
    assert breaker.would_refuse(100.0) == breaker.refusal(100.0) == "nothing listens there"

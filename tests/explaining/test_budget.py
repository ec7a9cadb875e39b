"""Time that a computation may take."""

import math

import pytest

from reftlab.errors import DataError
from reftlab.explaining.budget import Budget


def test_a_budget_is_spent_from_when_it_was_made(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("reftlab.explaining.budget.time.perf_counter", lambda: now[0])
    budget = Budget(10)
    assert (budget.spent, budget.left, budget.used_up) == (0, 10, False)
    now[0] = 104.0
    assert (budget.spent, budget.left, budget.used_up) == (4, 6, False)
    assert [budget.allows(seconds) for seconds in (5.9, 6.0)] == [True, False]
    now[0] = 111.0
    assert (budget.left, budget.used_up) == (0, True)


def test_without_a_limit_there_is_always_time():
    budget = Budget()
    assert (budget.left, budget.used_up, budget.allows(1e12)) == (None, False, True)
    assert Budget(0).used_up


@pytest.mark.parametrize("seconds", [-1, math.nan, True, "60"])
def test_what_is_no_time_is_refused_by_name(seconds):
    with pytest.raises(DataError, match=r"budget=.*: expected seconds, 0 or more, or None for no limit"):
        Budget(seconds)

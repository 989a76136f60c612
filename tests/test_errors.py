"""Faults are named for what the daemon does next."""

from __future__ import annotations

import inspect

import pytest

from spoold import errors
from spoold.errors import ConfigError, Halt, Problem, Refused, SpooldError, Stale, StoreUnavailable, Transient

FAMILIES = (Transient, Refused, Halt, Stale)
FAULTS = [fault for _, fault in inspect.getmembers(errors, inspect.isclass) if issubclass(fault, SpooldError)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_every_fault_belongs_to_one_family_so_that_the_walk_knows_what_to_do(fault: type[SpooldError]) -> None:
    families = [family for family in FAMILIES if issubclass(fault, family)]

    assert len(families) == (0 if fault in (SpooldError, ConfigError) else 1)


def test_a_fault_has_a_stable_name_a_message_and_a_remedy() -> None:
    fault = StoreUnavailable("put avatars/42/original/cat.jpg: 503 SlowDown", hint="wait", retry_after_s=3.0)

    assert "StoreUnavailable" == fault.code
    assert "put avatars/42/original/cat.jpg: 503 SlowDown" == str(fault)
    assert ("wait", 3.0, False) == (fault.hint, fault.retry_after_s, fault.never_sent)


def test_a_problem_is_written_as_compilers_do() -> None:
    problem = Problem("config.yaml", 3, 7, "s3.region", "is empty", "leave it out")

    assert "config.yaml:3:7: s3.region: is empty; leave it out" == str(problem)


def test_a_problem_without_a_remedy_ends_with_what_is_wrong() -> None:
    assert "c:1:1: file: is empty" == str(Problem("c", 1, 1, "file", "is empty"))


def test_a_configurations_problems_are_told_together() -> None:
    first, second = Problem("c", 1, 1, "a", "is wrong"), Problem("c", 2, 1, "b", "is wrong too")

    fault = ConfigError([first, second])

    assert "c:1:1: a: is wrong\nc:2:1: b: is wrong too" == str(fault)
    assert [first, second] == fault.problems

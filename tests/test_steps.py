"""Many walks side by side: what they write becomes durable together, and nobody waits for one that is being answered."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import pytest

from spoold.errors import ClaimLost, LedgerUnavailable
from spoold.steps import Ask, SideBySide, Steps, Write


class Book:
    """What a ledger is here: it knows which changes came with which commit."""

    def __init__(self) -> None:
        self.commits: list[list[str]] = []
        self.fault: LedgerUnavailable | None = None

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        self.commits.append([])
        yield
        if self.fault is not None:
            raise self.fault

    def note(self, word: str) -> str:
        self.commits[-1].append(word)
        return word.upper()


@pytest.fixture
def book() -> Book:
    return Book()


@pytest.fixture
def side_by_side(book: Book) -> Iterator[SideBySide]:
    with ThreadPoolExecutor(8) as pool:
        yield SideBySide(together=book.together, pool=pool)


def noting(book: Book, *words: str) -> Steps[str]:
    """Write down each word, and return what came of them."""
    said = []
    for word in words:
        said.append((yield Write(lambda word=word: book.note(word))))
    return " ".join(said)


def test_what_all_write_at_one_step_goes_into_one_commit(book: Book, side_by_side: SideBySide) -> None:
    ends = side_by_side.run([noting(book, "a1", "a2"), noting(book, "b1", "b2", "b3"), noting(book)])

    assert ["A1 A2", "B1 B2 B3", ""] == ends
    assert [["a1", "b1"], ["a2", "b2"], ["b3"]] == book.commits


def test_nothing_to_write_is_no_commit(book: Book, side_by_side: SideBySide) -> None:
    assert [] == side_by_side.run([])
    assert [] == book.commits


def asking(*requests: Callable[[], Any]) -> Steps[list[Any]]:
    answers: list[Any] = yield Ask([in_pool(request) for request in requests])
    return answers


def in_pool(request: Callable[[], Any]) -> Callable[[Executor], Future[Any]]:
    return lambda pool: pool.submit(request)


def test_answers_come_in_the_order_of_the_requests(side_by_side: SideBySide) -> None:
    second_was_asked = threading.Event()

    def first() -> str:
        assert second_was_asked.wait(10), "they are made at once"
        return "first"

    def second() -> str:
        second_was_asked.set()
        return "second"

    assert [["first", "second"], []] == side_by_side.run([asking(first, second), asking()])


def test_nobody_waits_for_one_that_is_being_answered(book: Book, side_by_side: SideBySide) -> None:
    others_are_done = threading.Event()

    def slow() -> Steps[str]:
        yield Ask([in_pool(lambda: others_are_done.wait(10))])
        return (yield Write(lambda: book.note("slow")))

    def quick() -> Steps[str]:
        yield Ask([in_pool(lambda: None)])
        said: str = yield Write(lambda: book.note("quick"))
        others_are_done.set()
        return said

    assert ["SLOW", "QUICK"] == side_by_side.run([slow(), quick()])
    assert [["quick"], ["slow"]] == book.commits


def test_a_change_that_fails_is_that_walks_alone(book: Book, side_by_side: SideBySide) -> None:
    def losing() -> Steps[str]:
        def lose() -> None:
            raise ClaimLost("walk avatars/1: its claim was taken over")

        try:
            yield Write(lose)
        except ClaimLost as lost:
            return str(lost)
        return "it was kept"

    ends = side_by_side.run([losing(), noting(book, "b1")])

    assert ["walk avatars/1: its claim was taken over", "B1"] == ends
    assert [["b1"]] == book.commits


def test_a_commit_that_fails_is_told_to_each_that_it_was_for(book: Book, side_by_side: SideBySide) -> None:
    book.fault = LedgerUnavailable("use ledger: disk I/O error")

    assert [book.fault, book.fault, [1]] == side_by_side.run([noting(book, "a"), noting(book, "b"), asking(lambda: 1)])


def test_what_nobody_expects_ends_them_all(book: Book, side_by_side: SideBySide) -> None:
    """A thread that dies takes the process with it: what is half done is taken up by the next one."""

    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        side_by_side.run([asking(broken), noting(book, "b1", "b2")])

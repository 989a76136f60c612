"""Many walks side by side.

A walk is one page for one batch: a generator, which yields what is to be written into the ledger and what is to be asked of
the store, and goes on when that is done. Here many of them are taken on together. What those want to write that have come so
far becomes durable with one commit; what they ask goes out at once; nobody waits for one that is still being answered.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from spoold.errors import LedgerUnavailable, SpooldError

T = TypeVar("T")

_GATHERING_S = 0.004  # what is answered so soon after the first goes on with it, and shares a commit


@dataclass(frozen=True, slots=True)
class Write:
    """A change of the ledger, or a question to it.

    The walk goes on with what it returns, when that is durable, or with the fault that it raises.
    """

    change: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Ask:
    """Requests to a store, at once. The walk goes on with what they return, in their order, when all have ended.

    Each is begun with the pool in which it may work, and tells by a Future when it has ended.
    """

    requests: Sequence[Callable[[Executor], Future[Any]]]


Steps = Generator[Write | Ask, Any, T]


class Turn:
    """Whose turn it is: of all threads that walk or look, one at a time does what is Python.

    More would not be faster, since one at a time is all that the interpreter lets run; but they would take it from each
    other at every call to the OS, some thousand times for each record, and that costs as much again (docs/performance.md).
    Nobody has the turn while he waits: for the disk, for a store, for the ledger's commit. Who asks first has it first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._is_taken = False
        self._waiting: deque[threading.Lock] = deque()  # each is released when it is handed over

    def __enter__(self) -> None:
        with self._lock:
            handed_over = threading.Lock() if self._is_taken else None
            self._is_taken = True
            if handed_over is not None:
                handed_over.acquire()
                self._waiting.append(handed_over)
        if handed_over is not None:
            handed_over.acquire()
        self._holder = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._holder = None
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_taken = False

    def pass_on(self) -> None:
        """Let those who wait have it first, if it is ours: who does little is not to wait until one who does much is done."""
        if self._waiting and self._holder == threading.get_ident():
            self.__exit__()
            self.__enter__()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Let others have it in the block, if it is ours."""
        is_ours = self._holder == threading.get_ident()
        if is_ours:
            self.__exit__()
        try:
            yield
        finally:
            if is_ours:
                self.__enter__()


class SideBySide:
    """Takes many walks on together, in the thread that calls it.

    together: makes all changes of the ledger in its block durable at its end. pool: where requests are made, if there are any.
    turn: shared with others like this one.
    """

    def __init__(
        self, *, together: Callable[[], AbstractContextManager[None]], pool: Executor | None = None, turn: Turn | None = None
    ) -> None:  # fmt: skip
        self._together = together
        self._pool = pool
        self._turn = turn or Turn()

    def run(self, walks: Sequence[Steps[T]], *, takes_turns: bool = True) -> list[T | LedgerUnavailable]:
        """Return how each walk ended, in their order; LedgerUnavailable where the ledger did not take its last word.

        Any other exception that a walk lets out ends them all. takes_turns: False for what takes long, like a large file.
        """
        turn = self._turn if takes_turns else contextlib.nullcontext()
        lanes = [_Lane(steps) for steps in walks]
        answered: queue.SimpleQueue[_Lane[T]] = queue.SimpleQueue()
        ready, asking = lanes, 0
        while ready or asking:
            writing = []
            with turn:
                for lane in ready:
                    self._turn.pass_on()
                    step = lane.go_on()
                    if isinstance(step, Write):
                        writing.append((lane, step))
                    elif isinstance(step, Ask):
                        assert self._pool is not None, "there are no requests"
                        asking += 1
                        lane.ask(step, self._pool, answered)
            self._write(writing, turn)
            ready = [lane for lane, _ in writing]
            if asking and not ready:
                ready.append(answered.get())
                asking -= 1
                if asking > answered.qsize():
                    threading.Event().wait(_GATHERING_S)
            while not answered.empty():
                ready.append(answered.get())
                asking -= 1
        return [lane.end for lane in lanes]

    def _write(self, writing: list[tuple[_Lane[T], Write]], turn: AbstractContextManager[None]) -> None:
        if not writing:
            return
        try:
            with contextlib.ExitStack() as until_commit:
                until_commit.enter_context(turn)
                with self._together():
                    for lane, step in writing:
                        try:
                            lane.answer = step.change()
                        except (SpooldError, OSError) as fault:
                            lane.fault = fault
                    until_commit.close()
        except LedgerUnavailable as fault:
            for lane, _ in writing:
                lane.fault = fault


class _Lane(Generic[T]):
    """One walk, and what it goes on with."""

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps
        self._left = 0
        self._counting = threading.Lock()
        self._asked: list[Future[Any]] = []
        self.answer: Any = None
        self.fault: BaseException | None = None
        self.end: Any = None

    def go_on(self) -> Write | Ask | None:
        """Take the walk to its next step; None if it has ended."""
        answer, fault = self.answer, self.fault
        self.answer = self.fault = None
        try:
            if self._asked:
                answer, self._asked = [future.result() for future in self._asked], []
            return self._steps.throw(fault) if fault is not None else self._steps.send(answer)
        except StopIteration as stop:
            self.end = stop.value
        except LedgerUnavailable as unavailable:
            self.end = unavailable
        return None

    def ask(self, step: Ask, pool: Executor, answered: queue.SimpleQueue[_Lane[T]]) -> None:
        """Have the requests made; the lane is put into `answered` when the last has ended."""
        self._left = len(step.requests)

        def ended(_: Future[Any]) -> None:
            with self._counting:
                self._left -= 1
                is_last = self._left == 0
            if is_last:
                answered.put(self)

        self._asked = [request(pool) for request in step.requests]
        for future in self._asked:
            future.add_done_callback(ended)
        if not step.requests:
            self.answer = []
            answered.put(self)

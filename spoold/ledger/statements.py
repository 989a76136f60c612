"""SQLAlchemy's statements at the driver's own speed.

SQLAlchemy knows the dialects, but to make a statement takes it some 150 µs and to run one 40 µs, besides what the database
does, and a walk runs about eighty. So those of every walk are made once, and so is the text that the driver gets.
"""

from __future__ import annotations

import contextlib
import operator
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import sqlalchemy
from sqlalchemy import BindParameter, Boolean, ClauseElement, Connection, Dialect
from sqlalchemy.sql import visitors

V = TypeVar("V")
Parameters = dict[str, Any]

_AT_ONCE = 500


class Rows(list[Any]):
    """What came of a statement: named tuples, all of them."""

    def all(self) -> list[Any]:
        return self

    def first(self) -> Any:
        return self[0] if self else None

    def one(self) -> Any:
        [row] = self
        return row

    def scalar(self) -> Any:
        return self[0][0] if self else None

    def scalar_one(self) -> Any:
        return self.one()[0]


class Statement:
    """A statement that is run very often, for any dialect.

    Its parameters are the bindparams that have no value, by name, a list for an expanding one; an INSERT or UPDATE sets
    the columns among them.
    """

    def __init__(self, clause: ClauseElement) -> None:
        self._clause = clause
        self._lists = [
            element.key for element in visitors.iterate(clause) if isinstance(element, BindParameter) and element.expanding
        ]  # fmt: skip
        self._texts: dict[tuple[Any, ...], _Text] = {}

    def text(self, dialect: Dialect, parameters: Parameters) -> _Text:
        """Return how the driver wants it for parameters of these names, and lists of these lengths."""
        shape: tuple[Any, ...] = (dialect.name, *parameters)
        if self._lists:
            shape += tuple(len(parameters[name]) for name in self._lists if name in parameters)
        text = self._texts.get(shape)
        if text is None:
            text = self._texts[shape] = _Text(self._clause, dialect, parameters)
        return text


class _Text:
    """A statement's text, and what the driver wants in which order."""

    def __init__(self, clause: ClauseElement, dialect: Dialect, parameters: Parameters) -> None:
        columns = list(parameters) if isinstance(clause, sqlalchemy.Insert | sqlalchemy.Update) else None
        compiled = cast(Any, clause.compile(dialect=dialect, column_keys=columns))
        expanded = compiled.construct_expanded_state(parameters)  # lists: their lengths are part of the text
        self.text = str(expanded.statement)
        self.is_positional = bool(compiled.positional)
        part_of = {
            part: (name, number)
            for name, parts in expanded.parameter_expansion.items()
            for number, part in enumerate(parts)
        }  # fmt: skip
        places: dict[str, Callable[[Parameters], Any]] = {}
        for part in expanded.positiontup or expanded.parameters:
            name, number = part_of.get(part, (part, None))
            if name not in parameters:
                value = compiled.binds[name].effective_value
                places[part] = _constant(value if number is None else value[number])
            else:
                places[part] = _value_of(name) if number is None else _nth_of(name, number)
        self._names = list(expanded.positiontup or places)
        self._places = [places[name] for name in self._names]
        is_plain = self.is_positional and all(name in parameters for name in self._names) and len(self._names) > 1
        self._plainly = operator.itemgetter(*self._names) if is_plain else None
        results: Iterable[Any] = getattr(clause, "exported_columns", ())
        self._booleans = [number for number, column in enumerate(results) if isinstance(column.type, Boolean)]
        self._row: Callable[[Iterable[Any]], Any] | None = None

    def arguments(self, parameters: Parameters) -> Sequence[Any] | Mapping[str, Any]:
        if self._plainly is not None:
            plain: tuple[Any, ...] = self._plainly(parameters)
            return plain
        values = [place(parameters) for place in self._places]
        return values if self.is_positional else dict(zip(self._names, values, strict=True))

    def rows(self, cursor: Any) -> Rows:
        if cursor.description is None:
            return Rows()
        if self._row is None:
            row: Any = namedtuple("Row", [column[0] for column in cursor.description])  # type: ignore[misc]
            self._row = row._make
        found = cursor.fetchall()
        if self._booleans:
            found = map(self._with_booleans, found)
        return Rows(map(self._row, found))

    def _with_booleans(self, row: Sequence[Any]) -> list[Any]:
        values = list(row)
        for number in self._booleans:
            values[number] = None if values[number] is None else bool(values[number])
        return values


class Session:
    """A connection on which both kinds of statements run, in transactions that begin and end when it is told to."""

    def __init__(self, engine: sqlalchemy.Engine) -> None:
        self._connection: Connection = engine.connect().execution_options(manual=True)
        self._driver = cast(Any, self._connection.connection.dbapi_connection)
        self._cursor = self._driver.cursor()
        self._dialect = engine.dialect

    def execute(self, statement: Statement | Any, parameters: Parameters | Sequence[Parameters] = ()) -> Any:
        """Run a statement, for each of the parameters if there are several: nothing comes of it then."""
        if not isinstance(statement, Statement):
            return self._connection.execute(statement, parameters or None)
        if isinstance(parameters, dict):
            text = statement.text(self._dialect, parameters)
            self._cursor.execute(text.text, text.arguments(parameters))
            return text.rows(self._cursor)
        if parameters:
            text = statement.text(self._dialect, parameters[0])
            self._cursor.executemany(text.text, [text.arguments(each) for each in parameters])
        return Rows()

    def begin(self, how: str) -> None:
        self._cursor.execute(how)

    def mark(self, statement: str) -> None:
        """SAVEPOINT, RELEASE or ROLLBACK TO one."""
        self._cursor.execute(statement)

    @property
    def is_in_transaction(self) -> bool:
        """Say whether there is one still: SQLite takes it back by itself where the disk is full."""
        return bool(self._driver.in_transaction)

    def commit(self) -> None:
        if self._connection.in_transaction():  # SQLAlchemy believes that it began one
            self._connection.commit()
        else:
            self._driver.commit()

    def rollback(self) -> None:
        if self._connection.in_transaction():
            self._connection.rollback()
        else:
            self._driver.rollback()

    def close(self) -> None:
        """Take back what is not committed, and close.

        Not SQLAlchemy alone: where its commit failed it takes nothing back, and SQLite keeps a connection, with its lock, for
        as long as anybody has a statement of it. We would wait for ourselves for ever.
        """
        with contextlib.suppress(Exception):  # what has failed already may fail here too
            self._cursor.close()
        with contextlib.suppress(Exception):
            self._driver.rollback()
        self._connection.close()


def _value_of(name: str) -> Callable[[Parameters], Any]:
    return lambda parameters: parameters[name]


def _nth_of(name: str, number: int) -> Callable[[Parameters], Any]:
    return lambda parameters: parameters[name][number]


def _constant(value: Any) -> Callable[[Parameters], Any]:
    return lambda _: value


def in_parts(values: Sequence[V]) -> Iterator[Sequence[V]]:
    """Yield them in lists that are short enough for one statement."""
    for start in range(0, len(values), _AT_ONCE):
        yield values[start : start + _AT_ONCE]

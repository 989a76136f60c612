"""The ledger's database: opened durably, migrated, and changed in transactions that tell what they changed."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy
import structlog
from sqlalchemy import Connection, insert, select, text
from sqlalchemy.engine import make_url

from spoold.clock import Clock, iso
from spoold.errors import LedgerUnavailable
from spoold.ledger import schema

log = structlog.get_logger()

_LEVELS = {
    "record.stalled": "warning",
    "batch.deferred": "warning",
    "clear.deferred": "warning",
    "claim.lost": "warning",
    "file.given_back": "warning",
    "deletes.held_back": "warning",
    "batch.dead": "error",
    "spool.held": "error",
    "file.set_aside": "debug",
    "file.deleted": "debug",
    "batch.resumed": "debug",
}
_UNTOLD = {"file.set_aside", "file.deleted", "batch.resumed"}  # not worth a row in the history


@dataclass(slots=True)
class Transaction:
    """One durable change. Its events become rows of the history with it, and log lines once it is committed."""

    connection: Connection
    now: float
    lines: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def at(self) -> str:
        return iso(self.now)

    def execute(self, statement: Any, *args: Any) -> sqlalchemy.CursorResult[Any]:
        return self.connection.execute(statement, *args)

    def tell(self, event: str, *, record_key: int | None = None, batch: int | None = None, **keys: Any) -> None:
        """Say what happened: a line in the log once this is durable, and a row in the record's history."""
        line = {name: value for name, value in {"batch": batch, **keys}.items() if value is not None}
        self.lines.append((event, line))
        if event not in _UNTOLD:
            detail = {name: value for name, value in line.items() if name not in ("spool", "record", "batch")}
            row = {
                "at": self.at,
                "record_key": record_key,
                "batch_id": batch,
                "event": event,
                "detail": json.dumps(detail),
            }
            self.connection.execute(insert(schema.history), row)


class Database:
    """A connection pool with one writer at a time.

    Raises LedgerUnavailable wherever the database does not answer, is full, or is no longer the file that was opened.
    """

    def __init__(self, url: str, *, clock: Clock, create: bool = True) -> None:
        self._clock = clock
        self._url = make_url(url)
        self._file = self._url.database if self._url.get_backend_name() == "sqlite" else None
        self._shown = self._url.render_as_string()  # without its password
        self._writing = threading.Lock()
        if self._file and not create and not os.path.exists(self._file):
            raise self._missing()
        self._engine = sqlalchemy.create_engine(self._url, connect_args={"timeout": 10.0, "check_same_thread": False})
        sqlalchemy.event.listen(self._engine, "connect", _configure)
        sqlalchemy.event.listen(self._engine, "begin", _begin)
        self._bring_up_to_date(create)
        self._inode = os.stat(self._file).st_ino if self._file else None
        with self.read() as connection:
            statement = select(schema.about.c.value).where(schema.about.c.name == "ledger")
            self.id: str = connection.execute(statement).scalar_one()

    def close(self) -> None:
        self._engine.dispose()

    @contextlib.contextmanager
    def write(self) -> Iterator[Transaction]:
        """Yield a transaction that is durable when the block ends; its log lines come then, in the order of commits."""
        with self._writing, _translated():
            self._demand_same_file()
            with self._engine.connect().execution_options(immediate=True) as connection, connection.begin():
                change = Transaction(connection, self._clock.now())
                yield change
            for event, keys in change.lines:
                getattr(log, _LEVELS.get(event, "info"))(event, **keys)

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """Yield a connection with one consistent view."""
        with _translated(), self._engine.connect() as connection, connection.begin():
            yield connection

    def _demand_same_file(self) -> None:
        """A database file that was unlinked or replaced swallows writes without a word (FACTS 28)."""
        if self._file is None:
            return
        try:
            same = os.stat(self._file).st_ino == self._inode
        except OSError:
            same = False
        if not same:
            raise LedgerUnavailable(
                f"write ledger {self._file}: the file was removed or replaced under the daemon",
                hint="put the old file back, or restart the daemon to use the one that is there",
            )

    def _missing(self) -> LedgerUnavailable:
        hint = "it is made by the first `spoold run` with this configuration"
        return LedgerUnavailable(f"open ledger {self._file or self._shown}: there is none yet", hint=hint)

    def _bring_up_to_date(self, create: bool) -> None:
        with _translated():
            with self._engine.connect() as connection:
                known = sqlalchemy.inspect(connection).has_table("alembic_version")
                revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar() if known else None
            if revision == schema.REVISION:
                return
            if revision is None and not create:
                raise self._missing()  # or it is being made at this moment
            if not create:
                raise LedgerUnavailable(
                    f"open ledger {self._shown}: its schema is {revision}, this spoold needs {schema.REVISION}",
                    hint="start the daemon of this version once: it migrates the ledger",
                )
            self._migrate(revision)

    def _migrate(self, revision: str | None) -> None:
        # Alembic's import costs 150 ms: only where there is something to do.
        import alembic.command
        import alembic.config
        import alembic.script
        import alembic.util

        config = alembic.config.Config()
        config.set_main_option("script_location", "spoold:migrations")
        config.set_main_option("path_separator", "os")
        if revision is not None:
            try:
                alembic.script.ScriptDirectory.from_config(config).get_revision(revision)
            except alembic.util.CommandError as error:
                raise LedgerUnavailable(
                    f"open ledger {self._shown}: its schema is {revision}, newer than this spoold's {schema.REVISION}",
                    hint="use the spoold that wrote it, or a newer one",
                ) from error
        with self._engine.connect().execution_options(immediate=True) as connection, connection.begin():
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, "head")
            if not connection.execute(select(schema.about.c.value)).first():
                connection.execute(insert(schema.about), {"name": "ledger", "value": str(uuid.uuid4())})
        log.info("ledger.migrated", ledger=self._shown, before=revision, after=schema.REVISION)


def _configure(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # NORMAL lost 200 of 200 commits in a power cut (FACTS 28)
    connection.execute("PRAGMA foreign_keys = ON")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("immediate") else "BEGIN")


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlalchemy.exc.IntegrityError:
        raise
    except sqlalchemy.exc.DBAPIError as error:
        raise LedgerUnavailable(
            f"use ledger: {error.orig}",
            hint="look at the disk and the permissions of state_dir; nothing is let go meanwhile",
        ) from error

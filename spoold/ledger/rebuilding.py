"""What is made of a bucket's listing after a ledger was lost: the records and objects that it had known.

Only additions: what the ledger has learned by itself since is newer than any listing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import insert, select

from spoold.clock import iso
from spoold.layout import Place
from spoold.ledger.database import Transaction
from spoold.ledger.schema import FOUND, about, key_owner, object_, record
from spoold.ledger.settling import Settling
from spoold.model import StoredObject


@dataclass(frozen=True, slots=True)
class Found:
    """An object that a listing met, and whose file it is by its key. modified_at: seconds since the epoch, by the server."""

    place: Place
    stored: StoredObject
    url: str | None
    modified_at: float


class Rebuilding(Settling):
    """The verbs of a rebuild."""

    def to_rebuild(self, spools: Iterable[str]) -> list[str]:
        """Return which of these spools' buckets are still to be listed: all, after the ledger was lost."""
        with self.read() as connection:
            if self._rebuilt_at(connection) == float("-inf"):
                return []
            return [spool for spool in spools if connection.execute(_is_listed(spool)).first() is None]

    def found(self, spool: str, objects: Iterable[Found]) -> int:
        """Take up the objects whose keys nobody has; return how many."""
        taken = 0
        with self.write() as change:
            for one in objects:
                here = key_owner.c.bucket == one.stored.bucket, key_owner.c.key == one.stored.key
                if change.execute(select(key_owner.c.record_key).where(*here)).first() is None:
                    self._take_up(change, spool, one)
                    taken += 1
        return taken

    def _take_up(self, change: Transaction, spool: str, one: Found) -> None:
        place, stored, at = one.place, one.stored, iso(one.modified_at)
        where = record.c.spool == spool, record.c.path == place.record
        key = change.execute(select(record.c.id).where(*where)).scalar()
        if key is None:
            row = {
                "spool": spool, "path": place.record, "attachment": place.attachment, "record_id": place.record_id,
                "version": 1, "fence": 0, "first_seen_at": at, "updated_at": change.at,
            }  # fmt: skip
            key = change.execute(insert(record).returning(record.c.id), row).scalar_one()
        change.execute(insert(key_owner), {"bucket": stored.bucket, "key": stored.key, "record_key": key})
        row = {
            "record_key": key, "batch_id": FOUND, "style": place.style, "basename": place.basename,
            "filename": place.filename, "bucket": stored.bucket, "key": stored.key, "url": one.url, "digest": "",
            "md5": stored.etag if "-" not in stored.etag else "", "size": stored.size, "content_type": stored.content_type,
            "etag": stored.etag, "uploaded_at": at, "proven_at": 0.0,
        }  # fmt: skip
        change.execute(insert(object_), row)

    def listed(self, spool: str, *, files: int) -> None:
        """All of the spool's bucket was met."""
        with self.write() as change:
            change.execute(insert(about), {"name": f"listed {spool}", "value": change.at})
            change.tell("spool.rebuilt", spool=spool, files=files)


def _is_listed(spool: str):  # type: ignore[no-untyped-def]  # spells out the column
    return select(about.c.value).where(about.c.name == f"listed {spool}")

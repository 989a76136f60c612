"""See what a live key holds after a version was given up whose PUTs have overwritten it, or may have.

An app may take back what it wrote while it goes up: a rollback, a record that is destroyed and made again. Then nobody walks
that version any more, and what the ledger tells of the key would be of an older one for ever.
"""

from __future__ import annotations

import dataclasses

import structlog

from spoold.clock import Clock
from spoold.doubts import Doubts
from spoold.errors import SpooldError
from spoold.ledger import Ledger, Overwritten
from spoold.store import Store

log = structlog.get_logger()


class Settler:
    """Looks at such keys, of all spools, and tells the ledger. Changes nothing in a bucket.

    stores: spool → store. doubt_s: how long a PUT without an answer may still land.
    """

    def __init__(self, *, ledger: Ledger, stores: dict[str, Store], owner: str, doubt_s: float, clock: Clock) -> None:
        self._ledger = ledger
        self._stores = stores
        self._owner = owner
        self._doubts = Doubts(doubt_s, clock)

    def settle_due(self, *, lease_s: float, held: set[str]) -> int:
        """Look at the keys that nothing can change any more, and return of how many the ledger told something else.

        held: spools whose destination refuses; theirs wait.
        """
        changed = 0
        for key in self._ledger.overwritten(self._stores):
            is_in_doubt = key.doubt_at is not None and self._doubts.left_s((key.key, key.doubt_at)) > 0
            if key.spool in held or is_in_doubt:
                continue
            fence = self._ledger.claim_record(key.record_key, self._owner, lease_s=lease_s)
            if fence is None:
                continue
            try:
                changed += self._settle(key)
            except SpooldError as why:  # later: the ledger names it again
                log.debug("settle.deferred", spool=key.spool, record=key.record, key=key.key, error=why.code, detail=str(why))
            finally:
                self._ledger.release_record(key.record_key, self._owner, fence)
        return changed

    def _settle(self, key: Overwritten) -> bool:
        store = self._stores[key.spool]
        found = store.head(key.bucket, key.key)
        is_as_told = found is not None and found.size == key.size and found.etag.lower() in (key.etag, key.md5)
        digests = store.digest(key.bucket, key.key) if found is not None and not is_as_told else None
        has_changed = found is not None and digests is not None and digests.sha256 in key.digests
        if found is not None and digests is not None and has_changed:
            # What HEAD tells of checksums is what a client has claimed; the digest is of what was read.
            proven = dataclasses.replace(found, checksum_algorithm=None, checksum=None)
            self._ledger.settled(key, holds=(proven, digests))
        else:
            self._ledger.settled(key, holds=None)
            if not is_as_told and (digests is None or digests.md5 != key.md5):
                log.warning(
                    "object.unknown", spool=key.spool, record=key.record, key=key.key,
                    detail="it holds nothing that spoold has put there" if found is not None else "it is not there",
                    hint="find out who else writes or deletes in this bucket",
                )  # fmt: skip
        if key.doubt_at is not None:
            self._doubts.forget([(key.key, key.doubt_at)])
        return has_changed

"""Abort multipart uploads of ours that nobody goes on with: their parts cost money until somebody does.

Only those whose ids are in the ledger: what else is under way in a bucket is nobody's business here. A walk that goes on with a
key aborts what was left open there itself.
"""

from __future__ import annotations

import structlog

from spoold.errors import SpooldError
from spoold.ledger import Ledger
from spoold.store import Store

log = structlog.get_logger()


class Orphans:
    """The open uploads of all spools. stores: spool → store."""

    def __init__(self, *, ledger: Ledger, stores: dict[str, Store], owner: str) -> None:
        self._ledger = ledger
        self._stores = stores
        self._owner = owner

    def abort_all(self, *, lease_s: float, held: set[str]) -> int:
        """Abort those that nobody works on, and return how many; what refuses is tried again. held: spools that wait."""
        aborted = 0
        for upload in self._ledger.open_uploads(set(self._stores) - held):
            fence = self._ledger.claim_record(upload.record_key, self._owner, lease_s=lease_s)
            if fence is None:
                continue
            try:
                self._stores[upload.spool].abort(upload.bucket, upload.key, upload.upload_id)
                self._ledger.aborted(upload)
                aborted += 1
            except SpooldError as why:
                log.debug(
                    "upload.not_aborted", spool=upload.spool, record=upload.record, key=upload.key, error=why.code,
                    detail=str(why),
                )  # fmt: skip
            finally:
                self._ledger.release_record(upload.record_key, self._owner, fence)
        return aborted

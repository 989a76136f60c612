"""Make a lost ledger's records and objects anew, from what the buckets hold.

What still lies in a spool is met by sweeps, and looked for in the bucket before it is put (`Ledger.intend`). What was let
go long ago only the bucket knows: its keys are read backwards, and an app that asks learns again that all is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import structlog

from spoold.content_type import sniff
from spoold.errors import SpooldError
from spoold.layout import Layout
from spoold.ledger import Found, Ledger
from spoold.store import Store

log = structlog.get_logger()

_AT_A_TIME = 200  # the ledger is busy meanwhile


@dataclass(frozen=True, slots=True)
class Source:
    """Where one spool's objects are. prefix: what all its keys begin with."""

    layout: Layout
    bucket: str
    prefix: str


class Rebuilder:
    """Lists the buckets of a ledger that was lost. sources: spool → where its objects are."""

    def __init__(self, *, ledger: Ledger, store: Store, sources: dict[str, Source]) -> None:
        self._ledger = ledger
        self._store = store
        self._sources = sources
        self._refused: set[str] = set()

    @property
    def is_due(self) -> bool:
        """A bucket is still to be listed."""
        return bool(self._ledger.to_rebuild(self._sources))

    def rebuild(self) -> None:
        """List what is still to be listed. A bucket that refuses is told of once, and tried again by the next call."""
        for spool in self._ledger.to_rebuild(self._sources):
            try:
                files = sum(self._ledger.found(spool, some) for some in self._found(self._sources[spool]))
            except SpooldError as fault:
                if spool not in self._refused:
                    self._refused.add(spool)
                    log.warning("spool.not_rebuilt", spool=spool, error=fault.code, detail=str(fault), hint=fault.hint)
                continue
            self._ledger.listed(spool, files=files)

    def _found(self, source: Source) -> Iterator[list[Found]]:
        some: list[Found] = []
        for stored, modified_at in self._store.listing(source.bucket, source.prefix):
            place = source.layout.parse_key(stored.key)
            if place is None:
                continue
            try:
                url = source.layout.url(place, stored.key, bucket=source.bucket, fingerprint=place.values.get("fingerprint"))
            except SpooldError:
                url = None
            # A HEAD would tell, for a request an object; the name tells nearly as much.
            stored = replace(stored, content_type=sniff(b"", place.filename))
            some.append(Found(place, stored, url, modified_at))
            if len(some) == _AT_A_TIME:
                yield some
                some = []
        yield some

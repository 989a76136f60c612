"""What a walk tells the ledger: the intents, what the store answered, and how far the batch came.

Every change made by a walk is a compare-and-set that also demands its live claim; losing it is ClaimLost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import BindParameter, and_, bindparam, delete, func, insert, or_, select, update

from spoold.clock import iso
from spoold.errors import ClaimLost, KeyTaken, SpooldError
from spoold.ledger.claiming import CHANGE_BATCH, Claiming, files_of
from spoold.ledger.database import REBUILT_AT, Transaction
from spoold.ledger.schema import (
    FOUND,
    about,
    batch,
    batch_file,
    history,
    intent,
    key_owner,
    object_,
    record,
    replaced,
    sighting,
)
from spoold.ledger.statements import Session, Statement, in_parts
from spoold.ledger.watching import CHANGE_RECORD
from spoold.model import (
    ORIGINAL,
    Answer,
    BatchFile,
    Claim,
    Put,
    PutResult,
    State,
    StoredObject,
    fingerprint,
)

_AGAIN_S = 1.0
_REBUILT_WITHIN_S = 3600.0  # what lay aside when the ledger was lost is given back soon after, with a new ctime
_VETOES = 100  # remembered of a record; what is forgotten is decoded once more
_NOTHING_WRONG: dict[str, Any] = {"attempts": 0, "next_attempt_at": None, "error_code": None, "error": None, "hint": None}


class Walking(Claiming):
    """The verbs of a walk."""

    # Uploading

    def intend(self, mine: Claim, puts: Sequence[Put]) -> list[Put]:
        """Write down key and digest of every PUT before it starts, and whose each key is from now on.

        A content that the key's newest PUT has proven to hold, with no PUT of other content in doubt, is adopted instead.
        Of a file that is older than a ledger made anew, the ledger that was lost may know more: its key is looked at before
        it is put, and what may be under way to it counts as a doubt.
        Raises KeyTaken if a key belongs to another record, and ClaimLost.
        """
        intended: list[Put] = []
        with self.write() as change:
            self._demand(change, mine)
            is_new = False
            rebuilt_at = self._rebuilt_at(change.session)
            self._take_keys(change, mine, puts)
            pasts = _by_key(change, _INTENTS_OF_KEYS, puts)
            rows: list[dict[str, Any]] = []
            for put in puts:
                past = pasts.get((put.bucket, put.key), [])
                put = self._with_abandoned(change, put, past)
                is_new = is_new or not past or past[0].digest != put.digests.sha256
                in_doubt = any(row.digest != put.digests.sha256 and row.doubt_at is not None for row in past)
                if past and past[0].answer == Answer.CONFIRMED and past[0].digest == put.digests.sha256 and not in_doubt:
                    put = dataclasses.replace(put, adopted=_stored_object(past[0]), intent=past[0].id)
                else:
                    row = {
                        "record_key": mine.batch.record_key, "batch_id": mine.batch.id, "kind": "put", "bucket": put.bucket,
                        "key": put.key, "digest": put.digests.sha256, "started_at": change.now,
                    }  # fmt: skip
                    if put.file.file.identity.ctime_ns / 1e9 < rebuilt_at + _REBUILT_WITHIN_S:
                        if not past:
                            doubt = {**row, "digest": None, "answer": Answer.DOUBT, "doubt_at": rebuilt_at}
                            change.execute(insert(intent), doubt)
                        was_sent = any(row.answer != Answer.REFUSED and row.digest is not None for row in past)
                        put = dataclasses.replace(put, is_sought=not was_sent)
                    rows.append(row)
                intended.append(put)
            change.execute(_BEGIN_INTENT, rows)
            if rows:
                begun = _by_key(change, _NEWEST_INTENTS, puts)
                intended = [
                    put if put.adopted is not None else dataclasses.replace(put, intent=begun[put.bucket, put.key][0].id)
                    for put in intended
                ]
            hashed = [
                {"of_file": put.file.id, "digest": put.digests.sha256, "bucket": put.bucket, "key": put.key}
                for put in intended
            ]  # fmt: skip
            change.execute(_NOTE_DIGEST, hashed)
            self._set_version(change, mine, is_new)
        return intended

    def _rebuilt_at(self, session: Session) -> float:
        """Return when this ledger was begun in the place of one that was lost, seconds since the epoch; -inf if it was not."""
        rebuilt_at = session.execute(_REBUILT_AT, {}).scalar()
        return float("-inf") if rebuilt_at is None else float(rebuilt_at)

    def _with_abandoned(self, change: Transaction, put: Put, past: Sequence[Any]) -> Put:
        """Hand over the multipart uploads that walks before this one left open; nobody is told of them twice."""
        left = [row for row in past if row.upload_id is not None and row.answer != Answer.CONFIRMED]
        if left:
            change.execute(update(intent).where(intent.c.id.in_([row.id for row in left])).values(upload_id=None))
        return dataclasses.replace(put, abandoned=tuple(row.upload_id for row in left))

    def _set_version(self, change: Transaction, mine: Claim, is_new: bool) -> None:
        """New content of the record, by digest, is a new version; the same bytes again are not."""
        version = change.execute(_VERSION_OF, {"of_record": mine.batch.record_key}).scalar_one() + is_new
        change.execute(CHANGE_RECORD, {"of_record": mine.batch.record_key, "version": version})
        change.execute(CHANGE_BATCH, {"of_batch": mine.batch.id, "version": version})

    def live_fingerprint(self, mine: Claim) -> str | None:
        """Return the MD5 of the record's live original, hex, if it has one."""
        with self.read() as connection:
            found: str | None = connection.execute(_LIVE_FINGERPRINT, {"of_record": mine.batch.record_key}).scalar()
            return found

    def was_taken_as_is(self, mine: Claim) -> bool:
        """Say whether a person had the batch taken as it lies."""
        with self.read() as connection:
            decided_by = connection.execute(select(batch.c.decided_by).where(batch.c.id == mine.batch.id)).scalar_one()
            return "as-is" in decided_by.split(",")

    def mark_hashed(self, mine: Claim, file: BatchFile, digest: str) -> None:
        """Write down the content of a file that goes with its batch without being uploaded: the marker."""
        with self.write() as change:
            self._demand(change, mine)
            change.execute(update(batch_file).where(batch_file.c.id == file.id).values(digest=digest))

    def _take_keys(self, change: Transaction, mine: Claim, puts: Sequence[Put]) -> None:
        owned = _by_key(change, _OWNERS_OF_KEYS, puts)
        for put in puts:
            owner = next((row.record_key for row in owned.get((put.bucket, put.key), [])), None)
            if owner not in (None, mine.batch.record_key):
                other = change.execute(select(record.c.spool, record.c.path).where(record.c.id == owner)).one()
                raise KeyTaken(
                    f"put {put.file.file.path}: its key {put.key} in bucket {put.bucket} belongs to record {other.path} "
                    f"of spool {other.spool}",
                    hint="give the spool a `key` that tells the two apart, or remove one of the two records",
                )
        free = {(put.bucket, put.key) for put in puts} - set(owned)
        taken = [{"bucket": bucket, "key": key, "record_key": mine.batch.record_key} for bucket, key in sorted(free)]
        change.execute(_TAKE_KEY, taken)

    def note_upload(self, identifier: int, upload_id: str) -> None:
        """Write down a multipart upload before its first part goes out."""
        with self.write() as change:
            change.execute(update(intent).where(intent.c.id == identifier).values(upload_id=upload_id))

    def answered(self, results: Iterable[PutResult]) -> None:
        """Write down what the store said. No claim is needed: this is what happened, whoever owns the record now.

        An answer that comes when a newer PUT or DELETE of the key has begun leaves the order of the two unknown, so it
        counts as a doubt that has just ended.
        """
        with self.write() as change:
            self._answered(change, list(results))

    def _answered(self, change: Transaction, results: Sequence[PutResult]) -> None:
        sent = [result for result in results if result.put.adopted is None]
        newest = {place: rows[0].id for place, rows in _by_key(change, _NEWEST_INTENTS, [r.put for r in sent]).items()}
        answers, proofs = [], []
        for result in sent:
            put = result.put
            overtaken = newest.get((put.bucket, put.key), 0) > put.intent
            values = {"of_intent": put.intent, "answer": result.answer, "doubt_at": result.doubt_at}
            if overtaken and result.answer is not Answer.REFUSED:
                values["doubt_at"] = change.now
            if result.stored is None:
                answers.append(values)
            else:
                proofs.append(values | _proof_columns(result.stored) | {"proven_at": change.now})
        change.execute(_CHANGE_INTENT, answers)
        change.execute(_CHANGE_INTENT, proofs)

    def stored(self, mine: Claim, results: Sequence[PutResult], *, replaced_after_s: float | None, elapsed_s: float) -> Claim:
        """Everything of the batch is proven in the bucket: from here on the bucket is the truth. Return the claim as it is now.

        What the store said is written down with it, and also if the claim is lost.
        replaced_after_s: how long keys outlive what a newer original put in their place; None keeps them for ever.
        """
        try:
            with self.write() as change:
                return self._stored(change, mine, results, replaced_after_s, elapsed_s)
        except ClaimLost:
            self.answered(results)
            raise

    def _stored(
        self, change: Transaction, mine: Claim, results: Sequence[PutResult], replaced_after_s: float | None, elapsed_s: float
    ) -> Claim:
        self._demand(change, mine)
        self._answered(change, results)
        before = {place: rows[0] for place, rows in _by_key(change, _OBJECTS_AT, [r.put for r in results]).items()}
        originals = [r.put for r in results if r.put.file.file.style == ORIGINAL and not r.was_there]
        new_originals = [
            put for put in originals
            if (was := before.get((put.bucket, put.key))) is None or was.digest != put.digests.sha256
        ]  # fmt: skip
        self._live(change, mine, results, before)
        if new_originals and replaced_after_s is not None:
            overwritten = {put.file.file.basename for put in new_originals if (put.bucket, put.key) in before}
            others = self._replaced_by(change, mine, new_originals, overwritten)
            self._replace(change, mine, others, due_at=change.now + replaced_after_s)
        values = {
            "state": State.STORED, "stored_at": change.at, "stored_moment": change.now, "crashes": 0,
            "due_at": change.now, "waiting_for": "", **_NOTHING_WRONG,
        }  # fmt: skip
        change.execute(CHANGE_BATCH, {"of_batch": mine.batch.id, **values})
        self._touched(change, mine.batch.record_key)
        size_bytes = sum(result.put.digests.size for result in results)
        self._tell(change, mine, "batch.stored", files=len(results), size_bytes=size_bytes, elapsed_s=round(elapsed_s, 3))
        [files] = files_of(change.session, [mine.batch.id])
        now_stored = dataclasses.replace(mine.batch, state=State.STORED, attempts=0, files=files)
        return dataclasses.replace(mine, batch=now_stored)

    def _live(
        self, change: Transaction, mine: Claim, results: Sequence[PutResult], before: Mapping[tuple[str, str], Any]
    ) -> None:
        """Put objects into the manifest in the place of what their keys held before."""
        proven = _proven_at(change, [result.put.intent for result in results if result.put.adopted is not None])
        rows, keys = [], []
        for result in results:
            assert result.stored is not None, "only proven objects are live"
            put, file = result.put, result.put.file.file
            was = before.get((put.bucket, put.key))
            unchanged = was is not None and was.digest == put.digests.sha256 and put.adopted is not None
            rows.append({
                "record_key": mine.batch.record_key, "batch_id": mine.batch.id, "style": file.style,
                "basename": file.basename, "filename": file.filename, "bucket": put.bucket, "key": put.key, "url": put.url,
                "digest": put.digests.sha256, "md5": put.digests.md5,
                "uploaded_at": was.uploaded_at if was is not None and unchanged else change.at,
                "proven_at": proven.get(put.intent) or change.now, **_proof_columns(result.stored),
            })  # fmt: skip
            keys.append({"of_bucket": put.bucket, "of_key": put.key, "of_intent": put.intent})
        change.execute(_NOT_LIVE, keys)
        change.execute(_INSERT_OBJECT, rows)
        change.execute(_NOT_REPLACED, keys)
        change.execute(_FORGET_OLDER, keys)

    def _replaced_by(
        self, change: Transaction, mine: Claim, new_originals: Sequence[Put], overwritten: set[str]
    ) -> set[tuple[str, str]]:
        """Return bucket and key of what new originals replaced: all else of the record, also what an abandoned version left.

        But not what was made of none of the originals before, or written after the new one: its style may have come first,
        where the original could not be seen for a moment. overwritten: basenames of originals that it took the key of.
        What was only found in the bucket leaves the manifest, but stays: nobody knows who uploaded it.
        """
        asked = {"of_record": mine.batch.record_key, "of_batch": mine.batch.id}
        change.execute(_FORGET_FOUND, asked)
        live = change.execute(_OTHERS_LIVE, asked)
        older = overwritten | {row.basename for row in live if row.style == ORIGINAL}
        since_ns = min(put.file.file.identity.ctime_ns for put in new_originals)
        stay = {
            (row.bucket, row.key) for row in live
            if row.style != ORIGINAL and (row.basename not in older or (row.ctime_ns or 0) > since_ns)
        }  # fmt: skip
        return {(row.bucket, row.key) for row in (*live, *change.execute(_OTHERS_WRITTEN, asked))} - stay

    def _replace(self, change: Transaction, mine: Claim, others: Collection[tuple[str, str]], *, due_at: float) -> None:
        """Have these keys of the record deleted when it is time."""
        keys = [{"of_bucket": bucket, "of_key": key} for bucket, key in others]
        change.execute(_NOT_LIVE, keys)
        change.execute(_NOT_REPLACED, keys)
        rows = [{"bucket": bucket, "key": key, "record_key": mine.batch.record_key, "due_at": due_at} for bucket, key in others]
        change.execute(_INSERT_REPLACED, rows)

    # How a walk ends

    def come_back(self, mine: Claim, due_at: float, waiting_for: str) -> None:
        """Give the claim back; the batch is due again at `due_at`, as soon as `waiting_for` is over."""
        with self.write() as change:
            was = self._demand(change, mine, even_superseded=True)
            self._end(change, mine, was, due_at=due_at, waiting_for=waiting_for, **_NOTHING_WRONG)

    def put_back(self, mine: Claim) -> None:
        """Give the claim back with the batch as it was: the destination is held, or the daemon drains. No attempt is spent."""
        with self.write() as change:
            if was := self._standing(change, mine):
                self._end(change, mine, was, due_at=change.now, behind_s=0.0)

    def defer(self, mine: Claim, fault: SpooldError, due_in_s: float) -> None:
        """Later again: an attempt is spent."""
        with self.write() as change:
            was = self._demand(change, mine)
            attempt = mine.batch.attempts + 1
            self._end(
                change, mine, was, due_at=change.now + due_in_s, behind_s=0.0, waiting_for="retry", attempts=attempt,
                next_attempt_at=iso(change.now + due_in_s), error_code=fault.code, error=str(fault), hint=fault.hint,
            )  # fmt: skip
            self._touched(change, mine.batch.record_key)
            self._tell(
                change, mine, "batch.deferred" if mine.batch.state is State.PENDING else "clear.deferred", attempt=attempt,
                due_in_s=round(due_in_s, 3), error=fault.code, detail=str(fault), hint=fault.hint,
            )  # fmt: skip

    def bury(self, mine: Claim, fault: SpooldError) -> None:
        """Never, as it stands: a person must look. The files stay where they are."""
        with self.write() as change:
            self._end(change, mine, self._demand(change, mine))
            self._bury(change, mine.batch.id, mine.batch.record_key, mine.batch.spool, mine.batch.record, fault)

    def withdraw(self, mine: Claim, fault: SpooldError, *, vetoed: Collection[str] = ()) -> None:
        """The world moved on: the batch is no more, the record is to be looked at again.

        vetoed: basenames whose files, as they are, must not be offered again: their images do not decode.
        """
        with self.write() as change:
            was = self._standing(change, mine)
            if was is None:
                return
            # One that was stored stays so, and is walked again: not at once, or two that disagree would never rest.
            self._end(change, mine, was, **({} if mine.batch.state is State.PENDING else {"due_at": change.now + _AGAIN_S}))
            key = mine.batch.record_key
            if was != State.PENDING:
                return
            row = change.execute(select(batch).where(batch.c.id == mine.batch.id)).one()
            change.execute(update(batch).where(batch.c.id == row.id).values(state=State.SUPERSEDED, due_at=None))
            self._given_up.add(key)
            before = change.execute(select(sighting.c.vetoed).where(sighting.c.record_key == key)).scalar()
            files = [file.file for file in mine.batch.uploads]
            marks = before.split(",") if before else []
            marks += [fingerprint(file for file in files if file.basename == basename) for basename in vetoed]
            change.execute(delete(sighting).where(sighting.c.record_key == key))
            waiting = {
                "record_key": key, "state": "receiving", "reason": str(fault), "files": row.files, "bytes": row.bytes,
                "vetoed": ",".join(marks[-_VETOES:]) or None,
            }  # fmt: skip
            change.execute(insert(sighting), waiting)
            self._touched(change, key)
            self._tell(change, mine, "batch.superseded", detail=str(fault))
            change.tell("record.seen", record_key=key, spool=mine.batch.spool, record=mine.batch.record)

    def reopen(self, mine: Claim, keys: Iterable[str], fault: SpooldError) -> None:
        """The bucket does not hold what was proven once: put these keys again while their files still lie here."""
        with self.write() as change:
            was = self._demand(change, mine)
            change.execute(
                update(intent)
                .where(
                    intent.c.record_key == mine.batch.record_key,
                    intent.c.key.in_(list(keys)),
                    intent.c.answer == Answer.CONFIRMED,
                )
                .values(answer=Answer.REFUSED)
            )
            self._end(
                change, mine, was, state=State.PENDING, due_at=change.now, waiting_for="retry", next_attempt_at=change.at,
                error_code=fault.code, error=str(fault), hint=fault.hint,
            )  # fmt: skip
            self._tell(change, mine, "batch.deferred", due_in_s=0.0, error=fault.code, detail=str(fault), hint=fault.hint)

    def done(self, mine: Claim, dirs_due_at: float | None) -> None:
        """The local files have left the app's tree for good, or stay by choice.

        dirs_due_at: when its empty directories may go, or None if there are none to see to.
        """
        with self.write() as change:
            was = self._demand(change, mine, even_superseded=True)
            due = {"due_at": dirs_due_at, "waiting_for": "dirs" if dirs_due_at is not None else "", **_NOTHING_WRONG}
            if was != State.STORED:
                self._end(change, mine, was, **due)
                return
            self._end(change, mine, was, state=State.DONE, done_at=change.at, **due)
            self._touched(change, mine.batch.record_key)
            self._tell(change, mine, "record.cleared", files=len(mine.batch.uploads))

    # History

    def prune(self, *, older_than_s: float) -> None:
        """Forget history that is older than this, and DELETEs that the fuse need not count any more."""
        with self.write() as change:
            change.execute(delete(history).where(history.c.at < iso(change.now - older_than_s)))
            is_over = and_(intent.c.kind == "delete", intent.c.answer.is_not(None), intent.c.doubt_at.is_(None))
            change.execute(delete(intent).where(is_over, intent.c.started_at < change.now - older_than_s))


def _by_key(change: Transaction, statement: Statement, puts: Sequence[Put]) -> dict[tuple[str, str], list[Any]]:
    """Run a statement for the keys of these PUTs, and return its rows by bucket and key."""
    keys: dict[str, list[str]] = {}
    for put in puts:
        keys.setdefault(put.bucket, []).append(put.key)
    found: dict[tuple[str, str], list[Any]] = {}
    for bucket, wanted in keys.items():
        for some in in_parts(wanted):
            asked = {"of_bucket": bucket, "of_keys": some}
            for row in change.execute(statement, asked):
                found.setdefault((row.bucket, row.key), []).append(row)
    return found


def _proven_at(change: Transaction, intents: Sequence[int]) -> dict[int, float | None]:
    """Return when each intent was proven, seconds since the epoch."""
    proven: dict[int, float | None] = {}
    for some in in_parts(intents):
        proven |= {row.id: row.proven_at for row in change.execute(_PROVEN_AT, {"of_intents": some})}
    return proven


# The statements of every walk.

_OF_KEYS: BindParameter[list[str]] = bindparam("of_keys", expanding=True)
_INTENTS_OF_KEYS = Statement(
    select(intent).where(intent.c.bucket == bindparam("of_bucket"), intent.c.key.in_(_OF_KEYS)).order_by(intent.c.id.desc())
)
_NEWEST_INTENTS = Statement(
    select(intent.c.bucket, intent.c.key, func.max(intent.c.id).label("id"))
    .where(intent.c.bucket == bindparam("of_bucket"), intent.c.key.in_(_OF_KEYS))
    .group_by(intent.c.bucket, intent.c.key)
)
_OWNERS_OF_KEYS = Statement(
    select(key_owner).where(key_owner.c.bucket == bindparam("of_bucket"), key_owner.c.key.in_(_OF_KEYS))
)
_TAKE_KEY = Statement(insert(key_owner))
_BEGIN_INTENT = Statement(insert(intent))
_CHANGE_INTENT = Statement(update(intent).where(intent.c.id == bindparam("of_intent")))
_PROVEN_AT = Statement(select(intent.c.id, intent.c.proven_at).where(intent.c.id.in_(bindparam("of_intents", expanding=True))))
_NOTE_DIGEST = Statement(update(batch_file).where(batch_file.c.id == bindparam("of_file")))
_VERSION_OF = Statement(select(record.c.version).where(record.c.id == bindparam("of_record")))
_REBUILT_AT = Statement(select(about.c.value).where(about.c.name == REBUILT_AT))
_LIVE_FINGERPRINT = Statement(
    select(object_.c.md5)
    .where(object_.c.record_key == bindparam("of_record"), object_.c.style == ORIGINAL)
    .order_by(object_.c.id.desc())
    .limit(1)
)
_OBJECTS_AT = Statement(
    select(object_.c.bucket, object_.c.key, object_.c.digest, object_.c.uploaded_at).where(
        object_.c.bucket == bindparam("of_bucket"), object_.c.key.in_(_OF_KEYS)
    )
)
_NOT_LIVE = Statement(delete(object_).where(object_.c.bucket == bindparam("of_bucket"), object_.c.key == bindparam("of_key")))
_INSERT_OBJECT = Statement(insert(object_))
_NOT_REPLACED = Statement(
    delete(replaced).where(replaced.c.bucket == bindparam("of_bucket"), replaced.c.key == bindparam("of_key"))
)
_MINE_KEYS = select(batch_file.c.key).where(batch_file.c.batch_id == bindparam("of_batch"), batch_file.c.key.is_not(None))
_OTHERS = and_(object_.c.record_key == bindparam("of_record"), object_.c.key.not_in(_MINE_KEYS))
_FORGET_FOUND = Statement(delete(object_).where(_OTHERS, object_.c.batch_id == FOUND))
_OTHERS_LIVE = Statement(
    select(object_.c.bucket, object_.c.key, object_.c.style, object_.c.basename, batch_file.c.ctime_ns)
    .outerjoin(batch_file, and_(batch_file.c.batch_id == object_.c.batch_id, batch_file.c.key == object_.c.key))
    .where(_OTHERS)
)
_OTHERS_WRITTEN = Statement(
    select(intent.c.bucket, intent.c.key).where(
        intent.c.record_key == bindparam("of_record"),
        intent.c.kind == "put",
        or_(intent.c.answer != Answer.REFUSED, intent.c.doubt_at.is_not(None)),
        intent.c.key.not_in(_MINE_KEYS),
    )
)
_INSERT_REPLACED = Statement(insert(replaced))
# What came before the newest proven PUT and is not in doubt has nothing left to tell.
_FORGET_OLDER = Statement(
    delete(intent).where(
        intent.c.bucket == bindparam("of_bucket"), intent.c.key == bindparam("of_key"), intent.c.id < bindparam("of_intent"),
        intent.c.answer.is_not(None), intent.c.doubt_at.is_(None), intent.c.kind == "put",
    )
)  # fmt: skip


def _stored_object(row: Any) -> StoredObject:
    return StoredObject(
        row.bucket, row.key, row.size, row.content_type, row.etag, row.checksum_algorithm, row.checksum, row.version_id
    )


def _proof_columns(stored: StoredObject) -> dict[str, Any]:
    return {
        "size": stored.size, "content_type": stored.content_type, "etag": stored.etag,
        "checksum_algorithm": stored.checksum_algorithm, "checksum": stored.checksum, "version_id": stored.version_id,
    }  # fmt: skip

"""The ledger's tables, as queries need them. What creates them are the migrations; a test holds the two together.

Moments that are compared are seconds since the epoch (float); moments that are read by people and apps are ISO 8601 text.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    and_,
    literal_column,
)
from sqlalchemy import false as sql_false

metadata = MetaData()

REVISION = "0005"
"""The newest migration; the ledger is brought up to it at start."""

_Id = BigInteger().with_variant(Integer, "sqlite")

FOUND = 0
"""The batch_id of objects that no batch of this ledger uploaded: they were found in the bucket when it was rebuilt."""

about = Table(
    "about",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

record = Table(
    "record",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("spool", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("attachment", Text, nullable=False),
    Column("record_id", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("fence", Integer, nullable=False),  # of the newest claim; only rises
    Column("first_seen_at", Text, nullable=False),
    Column("updated_at", Text, nullable=False),
    UniqueConstraint("spool", "path"),
)

sighting = Table(  # what lies in the spool and is not yet, or not any more, a batch
    "sighting",
    metadata,
    Column("record_key", _Id, ForeignKey("record.id"), primary_key=True),
    Column("state", Text, nullable=False),  # receiving | stalled | gone
    Column("reason", Text, nullable=False),
    Column("files", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("vetoed", Text),  # fingerprints of basenames whose images did not decode: not offered again as they are
    Column("as_is", Boolean, nullable=False, server_default=sql_false()),  # a person said: take it as it lies
)

elsewhere = Table(  # unfinished records that were last seen in another directory than the one that is the root now
    "elsewhere",
    metadata,
    Column("record_key", _Id, ForeignKey("record.id"), primary_key=True),
)

batch = Table(
    "batch",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("record_key", _Id, ForeignKey("record.id"), nullable=False),
    Column("state", Text, nullable=False),  # model.State
    Column("fingerprint", Text, nullable=False),
    Column("decided_by", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("files", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("crashes", Integer, nullable=False),  # claims of a pending batch whose walk never ended
    Column("due_at", Float),  # when somebody should walk it next; null: never
    Column("waiting_for", Text, nullable=False),  # attempt | retry | doubt | keep_for | min_age | grace | open | dirs | ""
    Column("next_attempt_at", Text),
    Column("error_code", Text),
    Column("error", Text),
    Column("hint", Text),
    Column("created_at", Text, nullable=False),
    Column("stored_at", Text),
    Column("stored_moment", Float),
    Column("done_at", Text),
    Column("behind_s", Float, nullable=False, server_default="0"),  # how far back in the queue it was put at first
    Index("batch_record", "record_key"),
)

PUT_BACK_S = 60.0
"""How far each crash puts a pending batch back in the queue; nothing waits longer for it, where nothing else is due."""

MOST_BEHIND_S = 3600.0
"""How far back in the queue a batch is put at most when it is offered."""

IS_PENDING = batch.c.state == literal_column("'pending'")  # spelled out, or the partial indexes are of no use
IS_NOT_PENDING = batch.c.state != literal_column("'pending'")
QUEUED_AT = batch.c.due_at + batch.c.crashes * literal_column(str(PUT_BACK_S)) + batch.c.behind_s

Index("batch_uploads", QUEUED_AT, batch.c.id, sqlite_where=IS_PENDING, postgresql_where=IS_PENDING)
Index(
    "batch_rest", batch.c.due_at, batch.c.id,
    sqlite_where=and_(IS_NOT_PENDING, batch.c.due_at.is_not(None)),
    postgresql_where=and_(IS_NOT_PENDING, batch.c.due_at.is_not(None)),
)  # fmt: skip

batch_file = Table(
    "batch_file",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("batch_id", _Id, ForeignKey("batch.id"), nullable=False),
    Column("path", Text, nullable=False),
    Column("style", Text, nullable=False),
    Column("basename", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("dev", BigInteger, nullable=False),
    Column("ino", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("mtime_ns", BigInteger, nullable=False),
    Column("ctime_ns", BigInteger, nullable=False),
    Column("is_marker", Boolean, nullable=False),
    Column("digest", Text),  # SHA-256, hex
    Column("bucket", Text),
    Column("key", Text),
    Column("aside_name", Text),  # while it lies in .spoold/aside
    Column("is_gone", Boolean, nullable=False),  # let go, given back, or not there any more: no business of this batch
    Index("batch_file_batch", "batch_id"),
)

claim = Table(  # who works on a record; no row: nobody
    "claim",
    metadata,
    Column("record_key", _Id, ForeignKey("record.id"), primary_key=True),
    Column("batch_id", _Id),
    Column("owner", Text, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("until", Float, nullable=False),
    Index("claim_owner", "owner"),
)

intent = Table(  # every PUT and DELETE, written before it starts (contract, section 6, rule 6)
    "intent",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("record_key", _Id, ForeignKey("record.id"), nullable=False),
    Column("batch_id", _Id),
    Column("kind", Text, nullable=False),  # put | delete
    Column("bucket", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("digest", Text),  # null for a delete
    Column("started_at", Float, nullable=False),
    Column("answer", Text),  # model.Answer; null while it is under way
    Column("doubt_at", Float),  # when its last try without an answer ended; null once that is settled
    Column("upload_id", Text),
    Column("etag", Text),
    Column("size", BigInteger),
    Column("content_type", Text),
    Column("checksum_algorithm", Text),
    Column("checksum", Text),
    Column("version_id", Text),
    Column("proven_at", Float),
    Index("intent_key", "bucket", "key"),
    Index("intent_record", "record_key"),
)

HAS_UPLOAD = intent.c.upload_id.is_not(None)
Index("intent_upload", intent.c.id, sqlite_where=HAS_UPLOAD, postgresql_where=HAS_UPLOAD)

object_ = Table(  # the manifest: every live object, with its newest proof
    "object",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("record_key", _Id, ForeignKey("record.id"), nullable=False),
    Column("batch_id", _Id, nullable=False),
    Column("style", Text, nullable=False),
    Column("basename", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("bucket", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("url", Text),
    Column("digest", Text, nullable=False),
    Column("md5", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("content_type", Text, nullable=False),
    Column("width", Integer),
    Column("height", Integer),
    Column("etag", Text, nullable=False),
    Column("checksum_algorithm", Text),
    Column("checksum", Text),
    Column("version_id", Text),
    Column("uploaded_at", Text, nullable=False),
    Column("proven_at", Float, nullable=False),
    UniqueConstraint("bucket", "key"),
    Index("object_record", "record_key"),
)

key_owner = Table(  # one key belongs to one record (rule 8)
    "key_owner",
    metadata,
    Column("bucket", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("record_key", _Id, ForeignKey("record.id"), nullable=False),
)

replaced = Table(  # keys that nothing needs any more, once due (rule 7)
    "replaced",
    metadata,
    Column("bucket", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("record_key", _Id, ForeignKey("record.id"), nullable=False),
    Column("due_at", Float, nullable=False),
    Index("replaced_due", "due_at"),
)

history = Table(
    "history",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("at", Text, nullable=False),
    Column("record_key", _Id),
    Column("batch_id", _Id),
    Column("event", Text, nullable=False),
    Column("detail", Text, nullable=False),  # the event's other keys, JSON
    Index("history_record", "record_key"),
)

held = Table(  # spools whose destination or disk refuses (rule 11)
    "held",
    metadata,
    Column("spool", Text, primary_key=True),
    Column("since", Text, nullable=False),
    Column("error_code", Text, nullable=False),
    Column("error", Text, nullable=False),
    Column("hint", Text, nullable=False),
)

"""The first schema: everything of contract section 3, and what lies under it."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

# The newest batch that counts, one a record.
CURRENT_BATCH = """
CREATE VIEW current_batch AS
SELECT b.* FROM batch b
WHERE b.id = (SELECT max(x.id) FROM batch x WHERE x.record_key = b.record_key AND x.state <> 'superseded')
"""

# Live objects, but those that the current batch is about to write anew: it counts them itself.
STANDING_OBJECT = """
CREATE VIEW standing_object AS
SELECT o.* FROM object o
WHERE NOT EXISTS (
    SELECT 1 FROM current_batch b JOIN batch_file f ON f.batch_id = b.id
    WHERE b.record_key = o.record_key AND b.state IN ('pending', 'dead')
        AND f.style = o.style AND f.filename = o.filename
)
"""

RECORD_STATE = """
CREATE VIEW record_state AS
SELECT r.id AS record_key, b.id AS batch_id,
    CASE
        WHEN s.state IN ('receiving', 'stalled') THEN s.state
        WHEN b.state = 'pending' AND EXISTS (SELECT 1 FROM claim c WHERE c.batch_id = b.id) THEN 'uploading'
        WHEN b.state = 'pending' AND b.next_attempt_at IS NOT NULL THEN 'retrying'
        WHEN b.state = 'pending' THEN 'queued'
        WHEN b.state = 'dead' THEN 'dead'
        WHEN b.state = 'stored' THEN 'uploaded'
        WHEN b.state = 'done' THEN 'done'
        WHEN EXISTS (SELECT 1 FROM object o WHERE o.record_key = r.id) THEN 'done'
        ELSE COALESCE(s.state, 'receiving')
    END AS state
FROM record r
LEFT JOIN sighting s ON s.record_key = r.id
LEFT JOIN current_batch b ON b.record_key = r.id
"""

RECORD_STATUS = """
CREATE VIEW record_status AS
SELECT
    r.spool, r.attachment, r.record_id, r.path, st.state,
    CASE WHEN st.state IN ('uploaded', 'done', 'gone') THEN 0 ELSE 1 END AS processing,
    CASE WHEN r.version > 0 THEN r.version ELSE 1 END AS version,
    (SELECT count(*) FROM standing_object o WHERE o.record_key = r.id)
        + CASE WHEN b.state IN ('pending', 'dead') THEN b.files ELSE 0 END
        + CASE WHEN st.state IN ('receiving', 'stalled') THEN COALESCE(s.files, 0) ELSE 0 END AS files,
    (SELECT COALESCE(sum(o.size), 0) FROM standing_object o WHERE o.record_key = r.id)
        + CASE WHEN b.state IN ('pending', 'dead') THEN b.bytes ELSE 0 END
        + CASE WHEN st.state IN ('receiving', 'stalled') THEN COALESCE(s.bytes, 0) ELSE 0 END AS bytes,
    COALESCE(b.attempts, 0) AS attempts,
    b.next_attempt_at,
    CASE st.state WHEN 'stalled' THEN 'Stalled' WHEN 'receiving' THEN NULL WHEN 'gone' THEN NULL ELSE b.error_code END
        AS error_code,
    CASE st.state WHEN 'stalled' THEN s.reason WHEN 'receiving' THEN NULL WHEN 'gone' THEN NULL ELSE b.error END AS error,
    r.first_seen_at, b.stored_at AS uploaded_at, b.done_at, r.updated_at
FROM record r
JOIN record_state st ON st.record_key = r.id
LEFT JOIN sighting s ON s.record_key = r.id
LEFT JOIN batch b ON b.id = st.batch_id
"""

RECORD_OBJECT = """
CREATE VIEW record_object AS
SELECT
    r.spool, r.path, o.style, o.filename, o.bucket, o.key, o.url, o.size, o.content_type, o.width, o.height,
    o.etag, o.checksum_algorithm, o.checksum, o.version_id, o.uploaded_at
FROM object o JOIN record r ON r.id = o.record_key
"""


_Id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "about",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "held",
        sa.Column("spool", sa.Text(), nullable=False),
        sa.Column("since", sa.Text(), nullable=False),
        sa.Column("error_code", sa.Text(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("hint", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("spool"),
    )
    op.create_table(
        "history",
        sa.Column("id", _Id, nullable=False),
        sa.Column("at", sa.Text(), nullable=False),
        sa.Column("record_key", _Id, nullable=True),
        sa.Column("batch_id", _Id, nullable=True),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("history_record", "history", ["record_key"], unique=False)
    op.create_table(
        "record",
        sa.Column("id", _Id, nullable=False),
        sa.Column("spool", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("attachment", sa.Text(), nullable=False),
        sa.Column("record_id", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("first_seen_at", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("spool", "path"),
    )
    op.create_table(
        "batch",
        sa.Column("id", _Id, nullable=False),
        sa.Column("record_key", _Id, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("decided_by", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("files", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("crashes", sa.Integer(), nullable=False),
        sa.Column("due_at", sa.Float(), nullable=True),
        sa.Column("waiting_for", sa.Text(), nullable=False),
        sa.Column("next_attempt_at", sa.Text(), nullable=True),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("hint", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.Column("stored_at", sa.Text(), nullable=True),
        sa.Column("stored_moment", sa.Float(), nullable=True),
        sa.Column("done_at", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["record_key"],
            ["record.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("batch_due", "batch", ["due_at"], unique=False)
    op.create_index("batch_record", "batch", ["record_key"], unique=False)
    op.create_table(
        "claim",
        sa.Column("record_key", _Id, nullable=False),
        sa.Column("batch_id", _Id, nullable=True),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("until", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["record_key"],
            ["record.id"],
        ),
        sa.PrimaryKeyConstraint("record_key"),
    )
    op.create_index("claim_owner", "claim", ["owner"], unique=False)
    op.create_table(
        "intent",
        sa.Column("id", _Id, nullable=False),
        sa.Column("record_key", _Id, nullable=False),
        sa.Column("batch_id", _Id, nullable=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=True),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("doubt_at", sa.Float(), nullable=True),
        sa.Column("upload_id", sa.Text(), nullable=True),
        sa.Column("etag", sa.Text(), nullable=True),
        sa.Column("size", sa.BigInteger(), nullable=True),
        sa.Column("content_type", sa.Text(), nullable=True),
        sa.Column("checksum_algorithm", sa.Text(), nullable=True),
        sa.Column("checksum", sa.Text(), nullable=True),
        sa.Column("version_id", sa.Text(), nullable=True),
        sa.Column("proven_at", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(
            ["record_key"],
            ["record.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("intent_key", "intent", ["bucket", "key"], unique=False)
    op.create_index("intent_record", "intent", ["record_key"], unique=False)
    op.create_table(
        "key_owner",
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("record_key", _Id, nullable=False),
        sa.ForeignKeyConstraint(
            ["record_key"],
            ["record.id"],
        ),
        sa.PrimaryKeyConstraint("bucket", "key"),
    )
    op.create_table(
        "object",
        sa.Column("id", _Id, nullable=False),
        sa.Column("record_key", _Id, nullable=False),
        sa.Column("batch_id", _Id, nullable=False),
        sa.Column("style", sa.Text(), nullable=False),
        sa.Column("basename", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=True),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("md5", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("content_type", sa.Text(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=True),
        sa.Column("height", sa.Integer(), nullable=True),
        sa.Column("etag", sa.Text(), nullable=False),
        sa.Column("checksum_algorithm", sa.Text(), nullable=True),
        sa.Column("checksum", sa.Text(), nullable=True),
        sa.Column("version_id", sa.Text(), nullable=True),
        sa.Column("uploaded_at", sa.Text(), nullable=False),
        sa.Column("proven_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["record_key"],
            ["record.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("bucket", "key"),
    )
    op.create_index("object_record", "object", ["record_key"], unique=False)
    op.create_table(
        "replaced",
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("record_key", _Id, nullable=False),
        sa.Column("due_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["record_key"],
            ["record.id"],
        ),
        sa.PrimaryKeyConstraint("bucket", "key"),
    )
    op.create_index("replaced_due", "replaced", ["due_at"], unique=False)
    op.create_table(
        "sighting",
        sa.Column("record_key", _Id, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("files", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("vetoed", sa.Text(), nullable=True),
        sa.Column("as_is", sa.Boolean(), server_default=sa.text("0"), nullable=False),
        sa.ForeignKeyConstraint(
            ["record_key"],
            ["record.id"],
        ),
        sa.PrimaryKeyConstraint("record_key"),
    )
    op.create_table(
        "batch_file",
        sa.Column("id", _Id, nullable=False),
        sa.Column("batch_id", _Id, nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("style", sa.Text(), nullable=False),
        sa.Column("basename", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("dev", sa.BigInteger(), nullable=False),
        sa.Column("ino", sa.BigInteger(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("mtime_ns", sa.BigInteger(), nullable=False),
        sa.Column("ctime_ns", sa.BigInteger(), nullable=False),
        sa.Column("is_marker", sa.Boolean(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=True),
        sa.Column("bucket", sa.Text(), nullable=True),
        sa.Column("key", sa.Text(), nullable=True),
        sa.Column("aside_name", sa.Text(), nullable=True),
        sa.Column("is_gone", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["batch_id"],
            ["batch.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("batch_file_batch", "batch_file", ["batch_id"], unique=False)
    for view in (CURRENT_BATCH, STANDING_OBJECT, RECORD_STATE, RECORD_STATUS, RECORD_OBJECT):
        op.execute(view)

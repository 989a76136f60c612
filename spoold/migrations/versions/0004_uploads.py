"""Multipart uploads that are open are found without a look at every PUT there ever was."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute("CREATE INDEX intent_upload ON intent (id) WHERE upload_id IS NOT NULL")


def downgrade() -> None:
    op.drop_index("intent_upload", "intent")

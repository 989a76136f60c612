"""How far back in the queue a batch was put, so that attachments take turns and what is large lets what is small go first."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("batch", sa.Column("behind_s", sa.Float, nullable=False, server_default="0"))
    op.drop_index("batch_uploads", "batch")
    op.execute("CREATE INDEX batch_uploads ON batch (due_at + crashes * 60.0 + behind_s, id) WHERE state = 'pending'")


def downgrade() -> None:
    op.drop_index("batch_uploads", "batch")
    op.drop_column("batch", "behind_s")
    op.execute("CREATE INDEX batch_uploads ON batch (due_at + crashes * 60.0, id) WHERE state = 'pending'")

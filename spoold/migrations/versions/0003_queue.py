"""The queue in the order in which workers take from it: what is claimed next costs the same however many wait."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.drop_index("batch_due", "batch")
    op.execute("CREATE INDEX batch_uploads ON batch (due_at + crashes * 60.0, id) WHERE state = 'pending'")
    op.execute("CREATE INDEX batch_rest ON batch (due_at, id) WHERE state != 'pending' AND due_at IS NOT NULL")


def downgrade() -> None:
    op.drop_index("batch_rest", "batch")
    op.drop_index("batch_uploads", "batch")
    op.create_index("batch_due", "batch", ["due_at"])

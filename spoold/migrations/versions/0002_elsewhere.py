"""Records that were last seen in another directory that was the spool's root: that they are not here says nothing."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "elsewhere",
        sa.Column("record_key", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=False),
        sa.ForeignKeyConstraint(["record_key"], ["record.id"]),
        sa.PrimaryKeyConstraint("record_key"),
    )


def downgrade() -> None:
    op.drop_table("elsewhere")

"""Schedules."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

SCHEMA = "exarq"


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "schedule",
        sa.Column("name", sa.Text(), primary_key=True),
        sa.Column("job", sa.Text(), nullable=False),
        sa.Column("args", postgresql.JSONB(), nullable=False, server_default="{}"),
        sa.Column("queue", sa.Text()),
        sa.Column("priority", sa.SmallInteger()),
        sa.Column("declared", sa.Boolean(), nullable=False),
        sa.Column("cron", sa.Text()),
        sa.Column("timezone", sa.Text(), nullable=False, server_default="UTC"),
        sa.Column("every", sa.Interval()),
        sa.Column("catch_up", sa.Text(), nullable=False, server_default="last"),
        sa.Column("overlap", sa.Text(), nullable=False, server_default="allow"),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("next_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("paused_at", sa.DateTime(timezone=True)),
        sa.Column("last_at", sa.DateTime(timezone=True)),
        sa.Column("last_job_id", sa.Uuid()),
        sa.CheckConstraint("(cron IS NULL) <> (every IS NULL)", name=op.f("schedule_rhythm_check")),
        schema=SCHEMA,
        postgresql_with={"fillfactor": 50, "autovacuum_vacuum_scale_factor": 0, "autovacuum_vacuum_threshold": 500},
    )
    op.create_index(
        "schedule_next", "schedule", ["next_at"], schema=SCHEMA, postgresql_where=sa.text("paused_at IS NULL")
    )


def downgrade() -> None:
    """Take back."""
    op.drop_table("schedule", schema=SCHEMA)

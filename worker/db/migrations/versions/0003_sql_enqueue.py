"""Enqueue by SQL, and the role that may do nothing else."""

from __future__ import annotations

from pathlib import Path

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# A role belongs to the server, not to this database, and who migrates may not be allowed to make one.
_MAKE_ROLE = """
DO $$ BEGIN
    IF to_regrole('exarq_enqueue') IS NULL THEN
        CREATE ROLE exarq_enqueue NOLOGIN;
    END IF;
EXCEPTION
    WHEN duplicate_object OR unique_violation THEN NULL; -- by the migration of another database, just now
    WHEN insufficient_privilege THEN RAISE WARNING 'this user may not make the role exarq_enqueue: see docs/roles.sql';
END $$
"""
_GRANT = """
DO $$ BEGIN
    IF to_regrole('exarq_enqueue') IS NOT NULL THEN
        GRANT USAGE ON SCHEMA exarq TO exarq_enqueue;
        GRANT EXECUTE ON FUNCTION exarq.enqueue TO exarq_enqueue;
    END IF;
END $$
"""
_REVOKE = """
DO $$ BEGIN
    IF to_regrole('exarq_enqueue') IS NOT NULL THEN
        REVOKE USAGE ON SCHEMA exarq FROM exarq_enqueue;
    END IF;
END $$
"""


def upgrade() -> None:
    """Apply."""
    op.execute(Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
    op.execute("REVOKE ALL ON FUNCTION exarq.enqueue FROM PUBLIC")
    op.execute(_MAKE_ROLE)
    op.execute(_GRANT)


def downgrade() -> None:
    """Take back, but for the role: it may have rights in other databases."""
    op.execute("DROP FUNCTION exarq.enqueue")
    op.execute(_REVOKE)

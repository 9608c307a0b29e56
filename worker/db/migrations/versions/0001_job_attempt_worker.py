"""Job, attempt, worker, upkeep and installation."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SCHEMA = "exarq"


# Called in the message of the COMMIT. Where it raises, that COMMIT does not take place.
# A connection keeps its plan, also from when the table held ten rows.
SUCCEED = """
CREATE FUNCTION exarq.succeed(job_id uuid, mine uuid, given text) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off AS $$
BEGIN
    UPDATE exarq.job
    SET state = 'succeeded', result = given::jsonb, finished_at = clock_timestamp(), error = NULL
    WHERE id = job_id AND token = mine AND state IS NOT DISTINCT FROM 'running';
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'EXQ01', MESSAGE = 'job ' || job_id || ' is held by somebody else';
    END IF;
END $$
"""


def upgrade() -> None:
    """Apply."""
    now = sa.text("clock_timestamp()")
    op.create_table(
        "job",
        sa.Column("id", sa.Uuid(), primary_key=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("args", postgresql.JSONB(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False, server_default="queued"),
        sa.Column("enqueued_at", sa.DateTime(timezone=True), nullable=False, server_default=now),
        sa.Column("first_due_at", sa.DateTime(timezone=True), nullable=False, server_default=now),
        sa.Column("run_at", sa.DateTime(timezone=True), nullable=False, server_default=now),
        sa.Column("attempt", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("failures", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("crashes", sa.SmallInteger(), nullable=False, server_default="0"),
        sa.Column("contended", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False, server_default=sa.text("false")),
        sa.Column("priority", sa.SmallInteger(), nullable=False, server_default="5"),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.Column("unique_key", sa.Text()),
        sa.Column("unique_for", sa.Text()),
        sa.Column("unique_until", sa.DateTime(timezone=True)),
        sa.Column("token", sa.Uuid()),
        sa.Column("worker_id", sa.Uuid()),
        sa.Column("started_at", sa.DateTime(timezone=True)),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.Column("progress", postgresql.JSONB()),
        sa.Column("result", postgresql.JSONB()),
        sa.Column("error", sa.Text()),
        sa.Column("arq_id", sa.Text()),
        sa.Column("arq_enqueued", sa.BigInteger()),
        sa.CheckConstraint(
            "state IN ('cancelled', 'failed', 'queued', 'running', 'succeeded')", name=op.f("job_state_check")
        ),
        sa.CheckConstraint("priority BETWEEN 0 AND 9", name=op.f("job_priority_check")),
        schema=SCHEMA,
        postgresql_with={
            "fillfactor": 85,
            "autovacuum_vacuum_scale_factor": 0,
            "autovacuum_vacuum_threshold": 5000,
            "autovacuum_analyze_scale_factor": 0,
            "autovacuum_analyze_threshold": 10000,
            "autovacuum_vacuum_insert_scale_factor": 0,
            "autovacuum_vacuum_insert_threshold": 50000,
        },
    )
    op.create_index("job_waiting", "job", ["run_at", "id"], schema=SCHEMA, postgresql_where=sa.text("state = 'queued'"))
    op.create_index("job_running", "job", ["worker_id"], schema=SCHEMA, postgresql_where=sa.text("state = 'running'"))
    op.create_index(
        "job_final",
        "job",
        ["state", "finished_at"],
        schema=SCHEMA,
        postgresql_where=sa.text("state IN ('cancelled', 'failed', 'succeeded')"),
    )
    op.create_index(
        "job_unique",
        "job",
        ["name", "unique_key"],
        unique=True,
        schema=SCHEMA,
        postgresql_where=sa.text(
            "unique_key IS NOT NULL AND (unique_until IS NOT NULL OR state = 'queued' AND attempt = 0"
            " OR unique_for = 'until_done' AND (state = 'queued' OR state = 'running'))"
        ),
    )
    op.create_index(
        "job_adopted",
        "job",
        ["arq_id", "arq_enqueued"],
        unique=True,
        schema=SCHEMA,
        postgresql_where=sa.text("arq_id IS NOT NULL"),
    )
    op.create_table(
        "attempt",
        sa.Column("job_id", sa.Uuid(), primary_key=True),
        sa.Column("token", sa.Uuid(), primary_key=True),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.Uuid()),
        sa.Column("started_at", sa.DateTime(timezone=True)),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=False, server_default=now),
        sa.Column("ending", sa.Text(), nullable=False),
        sa.Column("error", sa.Text()),
        sa.Column("traceback", sa.Text()),
        sa.Column("blocked", sa.Interval()),
        sa.Column("lazy_loads", postgresql.JSONB()),
        schema=SCHEMA,
    )
    one_row_each = {"fillfactor": 50, "autovacuum_vacuum_scale_factor": 0, "autovacuum_vacuum_threshold": 500}
    op.create_table(
        "worker",
        sa.Column("id", sa.Uuid(), primary_key=True),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("queues", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("concurrency", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False, server_default=now),
        sa.Column("beat", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("beat_at", sa.DateTime(timezone=True), nullable=False, server_default=now),
        sa.Column("stopping_at", sa.DateTime(timezone=True)),
        schema=SCHEMA,
        postgresql_with=one_row_each,
    )
    upkeep = op.create_table(
        "upkeep",
        sa.Column("step", sa.Text(), primary_key=True),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False, server_default=now),
        sa.Column("after_run_at", sa.DateTime(timezone=True)),
        sa.Column("after_id", sa.Uuid()),
        schema=SCHEMA,
        postgresql_with=one_row_each,
    )
    op.bulk_insert(upkeep, [{"step": "reconcile"}, {"step": "prune"}])
    op.create_table("installation", sa.Column("id", sa.Uuid(), primary_key=True), schema=SCHEMA)
    op.execute("INSERT INTO exarq.installation VALUES (gen_random_uuid())")
    op.execute(SUCCEED)


def downgrade() -> None:
    """Take back."""
    op.execute("DROP FUNCTION exarq.succeed(uuid, uuid, text)")
    for table in ("installation", "upkeep", "worker", "attempt", "job"):
        op.drop_table(table, schema=SCHEMA)

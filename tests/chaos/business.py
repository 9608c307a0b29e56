"""The tables of the business under test, and a history of every move that a job's row has made."""

from __future__ import annotations

from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

# `placed` is written in the transaction that enqueues, `effect` by the job through its session. No constraint keeps
# anything from happening twice: that is what is under test. The history's rows commit or vanish with the move itself.
_TABLES: Final = """
CREATE TABLE placed (job_id uuid PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE TABLE effect (
    job_id uuid NOT NULL, part integer NOT NULL, attempt integer NOT NULL, child uuid);
CREATE INDEX ON effect (job_id);
CREATE INDEX ON effect (child) WHERE child IS NOT NULL;
CREATE TABLE history (
    n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, job_id uuid NOT NULL, was text, became text,
    attempt integer, token uuid, old_token uuid, worker_id uuid, writer text NOT NULL, at timestamptz NOT NULL);
CREATE INDEX ON history (job_id);
CREATE FUNCTION note_move() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO public.history (job_id, was, became, attempt, token, old_token, worker_id, writer, at)
        VALUES (NEW.id, NULL, NEW.state, NEW.attempt, NEW.token, NULL, NEW.worker_id,
                current_setting('application_name'), clock_timestamp());
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO public.history (job_id, was, became, attempt, token, old_token, worker_id, writer, at)
        VALUES (OLD.id, OLD.state, NULL, OLD.attempt, OLD.token, OLD.token, OLD.worker_id,
                current_setting('application_name'), clock_timestamp());
    ELSE
        INSERT INTO public.history (job_id, was, became, attempt, token, old_token, worker_id, writer, at)
        VALUES (NEW.id, OLD.state, NEW.state, NEW.attempt, NEW.token, OLD.token, NEW.worker_id,
                current_setting('application_name'), clock_timestamp());
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER moves AFTER INSERT OR DELETE ON exarq.job FOR EACH ROW EXECUTE FUNCTION note_move();
CREATE TRIGGER changes AFTER UPDATE ON exarq.job FOR EACH ROW
    WHEN (OLD.state IS DISTINCT FROM NEW.state OR OLD.token IS DISTINCT FROM NEW.token)
    EXECUTE FUNCTION note_move();
"""


async def create_tables(engine: AsyncEngine) -> None:
    """Create the tables, beside Exarq's own."""
    async with engine.begin() as connection:
        raw = await connection.get_raw_connection()
        driver = raw.driver_connection
        assert driver is not None
        await driver.execute(_TABLES)


async def placed(engine: AsyncEngine) -> int:
    """How many enqueues are committed."""
    async with engine.connect() as connection:
        return int((await connection.execute(text("SELECT count(*) FROM placed"))).scalar_one())

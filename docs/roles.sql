-- Roles with the least that they need, for a database in which Exarq's tables are not everybody's.
-- Run it as the owner of the schema `exarq`, after `exarq db upgrade` (which needs that owner, or CREATE on the database),
-- and again after an upgrade that brings a new table. Passwords, and CONNECT where PUBLIC has lost it, are up to you.

-- A worker: claims, completes, beats, ticks, rescues, reconciles, prunes. What its jobs touch is granted beside it.
-- All workers of an installation share one role, for a rescuer may end the connections of its own role only.
CREATE ROLE exarq_worker LOGIN;
GRANT USAGE ON SCHEMA exarq TO exarq_worker;
GRANT SELECT, INSERT, UPDATE, DELETE ON exarq.job, exarq.worker TO exarq_worker;
GRANT SELECT, INSERT, UPDATE ON exarq.schedule TO exarq_worker;
GRANT SELECT, INSERT, DELETE ON exarq.attempt TO exarq_worker;
GRANT SELECT, UPDATE ON exarq.upkeep TO exarq_worker;
GRANT SELECT ON exarq.installation, exarq.alembic_version TO exarq_worker;
GRANT EXECUTE ON FUNCTION exarq.succeed TO exarq_worker;

-- A service that enqueues, and reads no arguments or results of what others have enqueued.
CREATE ROLE exarq_service LOGIN;
GRANT USAGE ON SCHEMA exarq TO exarq_service;
GRANT INSERT, SELECT (id, run_at, enqueued_at) ON exarq.job TO exarq_service;
GRANT SELECT ON exarq.installation TO exarq_service;
-- For key=…: it sees every job's name, key and state, may change what waits (on_conflict='replace') and cancel what has
-- expired under a key that it wants. A service without keys does not need these two.
GRANT SELECT (name, queue, state, attempt, priority, expires_at, unique_key, unique_for, unique_until,
    finished_at, error) ON exarq.job TO exarq_service;
GRANT UPDATE (args, run_at, first_due_at, priority, expires_at, unique_until, state, finished_at, error)
    ON exarq.job TO exarq_service;

-- Any program that enqueues by SQL, in its own transaction, and reads nothing: GRANT exarq_enqueue TO its role.
-- `exarq db upgrade` has made this role if it was allowed to; it belongs to the server, whichever databases use it.
DO $$ BEGIN
    IF to_regrole('exarq_enqueue') IS NULL THEN
        CREATE ROLE exarq_enqueue NOLOGIN;
    END IF;
END $$;
GRANT USAGE ON SCHEMA exarq TO exarq_enqueue;
GRANT EXECUTE ON FUNCTION exarq.enqueue TO exarq_enqueue;

-- Somebody who looks: `exarq jobs list`, `exarq jobs show`, `exarq schedules list`, `exarq db current`.
CREATE ROLE exarq_reader LOGIN;
GRANT USAGE ON SCHEMA exarq TO exarq_reader;
GRANT SELECT ON exarq.job, exarq.attempt, exarq.schedule, exarq.alembic_version TO exarq_reader;

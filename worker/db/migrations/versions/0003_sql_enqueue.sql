-- – → queued, for a program in any language, in its own transaction; what may be said is what Python's enqueue takes.
-- Returns the id of the job, or of the one that has the key: that one may start before the caller's commit.
CREATE FUNCTION exarq.enqueue(
    name text,
    args jsonb DEFAULT '{}',
    queue text DEFAULT 'default',
    run_at timestamptz DEFAULT NULL,
    key text DEFAULT NULL,
    priority integer DEFAULT 5,
    unique_for text DEFAULT 'until_done',
    expires_at timestamptz DEFAULT NULL
) RETURNS uuid LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
DECLARE
    -- Not now(): that is the start of the transaction.
    moment timestamptz := clock_timestamp();
    longest interval := '36500 days';
    unprintable text := '[\u0001-\u001F\u007F-\u00A0\u00AD\u1680\u180E\u2000-\u200F\u2028-\u202F\u205F-\u206F\u3000\uE000-\uF8FF\uFEFF\uFFF9-\uFFFB]';
    -- A UUID of version 7: its millisecond, then the random part of one of version 4.
    millisecond text := lpad(to_hex(floor(extract(epoch FROM moment) * 1000)::bigint), 12, '0');
    new_id uuid := left(millisecond, 8) || '-' || right(millisecond, 4) || '-7' || substr(gen_random_uuid()::text, 16);
    holder uuid;
    over boolean;
    fault text;
    advice text;
BEGIN
    args := coalesce(args, '{}');
    queue := coalesce(queue, 'default');
    run_at := coalesce(run_at, moment);
    priority := coalesce(priority, 5);
    unique_for := coalesce(unique_for, 'until_done');

    SELECT said, hint INTO fault, advice FROM (VALUES
        (name IS NULL OR char_length(name) NOT BETWEEN 1 AND 200 OR name ~ unprintable,
            'a name is 1 to 200 printable characters, not ' || coalesce(quote_literal(left(name, 50)), 'NULL'),
            'Give the name that the worker registers the job under, such as ''billing.charge''.'),
        (jsonb_typeof(args) <> 'object',
            'args must be a JSON object, not ' || jsonb_typeof(args),
            'Name each argument: ''{"invoice_id": 7}''.'),
        (octet_length(args::text) > 1048576,
            'args take ' || octet_length(args::text) || ' bytes as JSON, the limit is 1048576',
            'Store the data in a table and pass its key.'),
        (args @? '$.**{201}',
            'args are nested deeper than 200 levels',
            'Flatten them, or store them in a table and pass its key.'),
        (char_length(queue) NOT BETWEEN 1 AND 200 OR queue ~ unprintable OR queue ~ '^(arq|exarq):',
            'a queue is 1 to 200 printable characters that do not begin with arq: or exarq:',
            'Leave it out for the queue ''default''.'),
        (NOT run_at BETWEEN moment - longest AND moment + longest,
            'run_at must lie within 36500 days of now, not at ' || run_at,
            'Leave it out to run the job at once.'),
        (NOT priority BETWEEN 0 AND 9,
            'priority must be a whole number from 0 (first) to 9, not ' || priority,
            'Leave it out for 5.'),
        (NOT expires_at BETWEEN moment - longest AND moment + longest OR expires_at <= run_at,
            'expires_at must lie after the moment the job is due, ' || run_at || ', not at ' || expires_at,
            'Leave it out for no deadline.'),
        (NOT octet_length(key) BETWEEN 1 AND 1000,
            'a key is 1 to 1000 bytes, not ' || octet_length(key),
            'Hash what is longer; leave it out for a job that may be there more than once.'),
        (unique_for NOT IN ('until_done', 'until_started'),
            'unique_for must be ''until_done'' or ''until_started'', not ' || quote_literal(left(unique_for, 50)),
            'Leave it out for ''until_done''.')
    ) AS checks (wrong, said, hint) WHERE wrong LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'exarq.enqueue: ' || fault, HINT = advice;
    END IF;

    FOR try IN 1..100 LOOP
        INSERT INTO exarq.job
            (id, name, queue, args, enqueued_at, first_due_at, run_at, priority, expires_at, unique_key, unique_for)
        VALUES (new_id, enqueue.name, enqueue.queue, enqueue.args, moment, enqueue.run_at, enqueue.run_at, enqueue.priority,
            enqueue.expires_at, key, CASE WHEN key IS NOT NULL THEN enqueue.unique_for END)
        ON CONFLICT (name, unique_key) WHERE unique_key IS NOT NULL AND (unique_until IS NOT NULL
            OR state = 'queued' AND attempt = 0
            OR unique_for = 'until_done' AND (state = 'queued' OR state = 'running')) DO NOTHING;
        IF FOUND THEN
            IF enqueue.run_at <= moment + interval '30 s' THEN  -- a later one is brought to Redis when its time has come
                PERFORM pg_notify('exarq', new_id::text);
            END IF;
            RETURN new_id;
        END IF;

        SELECT id, coalesce(state = 'queued' AND expires_at < clock_timestamp()
                OR state IN ('cancelled', 'failed', 'succeeded') AND unique_until <= clock_timestamp(), false)
        INTO holder, over FROM exarq.job
        WHERE name = enqueue.name AND unique_key = key AND (unique_until IS NOT NULL
            OR state = 'queued' AND attempt = 0
            OR unique_for = 'until_done' AND (state = 'queued' OR state = 'running'));
        IF holder IS NOT NULL AND NOT over THEN
            RETURN holder;
        END IF;

        -- Its key is free: final, its time of uniqueness over; queued → cancelled, its deadline over.
        UPDATE exarq.job SET unique_until = NULL,
            state = CASE state WHEN 'queued' THEN 'cancelled' ELSE state END,
            finished_at = CASE state WHEN 'queued' THEN clock_timestamp() ELSE finished_at END,
            error = CASE state WHEN 'queued' THEN 'expired: no attempt may start after ' || expires_at ELSE error END
        WHERE id = holder AND (state = 'queued' AND expires_at < clock_timestamp()
            OR state IN ('cancelled', 'failed', 'succeeded') AND unique_until <= clock_timestamp());
    END LOOP;
    RAISE EXCEPTION USING ERRCODE = 'serialization_failure',
        MESSAGE = 'exarq.enqueue: jobs with this key came and went 100 times', HINT = 'Enqueue again.';
END
$function$

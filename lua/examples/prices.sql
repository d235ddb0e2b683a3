-- The price list for prices.lua, PostgreSQL 15 or newer.
--
--   psql -d accounting -f prices.sql
--
-- May be run again: prices that exist stay as they are.
--
-- Change a price, and every daemon that listens has it a moment later:
--
--   UPDATE reaper.price SET price = 0.00002 WHERE counter = 'cpu_total';

\set ON_ERROR_STOP on

BEGIN;
SET LOCAL client_min_messages TO warning; -- rather than a notice for all that exists

CREATE SCHEMA IF NOT EXISTS reaper;
SET LOCAL search_path TO reaper;

CREATE TABLE IF NOT EXISTS price (
    -- A field of cgroup.own. What is not in the table costs nothing.
    counter text PRIMARY KEY CHECK (counter IN (
        'cpu_total', 'cpu_user', 'cpu_system',
        'memory_events_oom_kill', 'pids_forks',
        'io_read_bytes', 'io_write_bytes', 'io_read_operations', 'io_write_operations'
    )),
    price numeric NOT NULL CHECK (price >= 0) -- of one second, byte, operation, ...
);

INSERT INTO price (counter, price) VALUES
    ('cpu_total', 0.00001),
    ('io_read_bytes', 0.00000000001),
    ('io_write_bytes', 0.00000000002)
ON CONFLICT (counter) DO NOTHING;

-- Tell whoever listens, once for each statement. It is sent when the transaction is committed.
CREATE OR REPLACE FUNCTION notify_prices() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NOTIFY prices;
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER price_changed
    AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON price
    FOR EACH STATEMENT EXECUTE FUNCTION notify_prices();

COMMIT;

-- What the daemon's user needs:
--
--   CREATE ROLE "cm4all-spawn-reaper" LOGIN;
--   GRANT USAGE ON SCHEMA reaper TO "cm4all-spawn-reaper";
--   GRANT SELECT ON reaper.price TO "cm4all-spawn-reaper";

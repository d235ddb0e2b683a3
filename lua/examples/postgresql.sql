-- Tables for postgresql.lua, PostgreSQL 15 or newer.
--
--   psql -d accounting -f postgresql.sql
--
-- May be run again: what exists stays as it is.

\set ON_ERROR_STOP on

BEGIN;
SET LOCAL client_min_messages TO warning; -- rather than a notice for all that exists

CREATE SCHEMA IF NOT EXISTS reaper;
SET LOCAL search_path TO reaper;

-- One row for each call of cgroup_released.
CREATE TABLE IF NOT EXISTS release (
    id text PRIMARY KEY, -- cgroup.id: whoever sends a release twice is found out by it
    released timestamptz NOT NULL,
    path text NOT NULL,
    account text NOT NULL,
    remainder boolean NOT NULL, -- used between the record of a release and its deletion
    age double precision, -- seconds

    -- A maximum, of the cgroup and all below it; not to be added up. NULL, here and below, where
    -- the kernel has no number.
    memory_peak bigint, -- bytes

    -- From cgroup.own: these may be added up. Times are in seconds; numeric, since sums of floating
    -- point numbers depend on their order.
    cpu_total numeric(20, 6),
    cpu_user numeric(20, 6),
    cpu_system numeric(20, 6),
    oom bigint,
    forks bigint,
    io_read_bytes bigint,
    io_write_bytes bigint
);

-- For reports over a time, and for deleting what is old.
CREATE INDEX IF NOT EXISTS release_released ON release (released);
CREATE INDEX IF NOT EXISTS release_account ON release (account, released);

-- The sums over all releases that were ever recorded, also after their rows were deleted.
CREATE TABLE IF NOT EXISTS account_total (
    account text PRIMARY KEY,
    releases bigint NOT NULL, -- remainders are not counted, but their usage is
    memory_peak bigint, -- the highest of all
    cpu_total numeric(20, 6) NOT NULL,
    cpu_user numeric(20, 6) NOT NULL,
    cpu_system numeric(20, 6) NOT NULL,
    oom bigint NOT NULL,
    forks bigint NOT NULL,
    io_read_bytes bigint NOT NULL,
    io_write_bytes bigint NOT NULL
)
-- Each release of an account changes its row: leave room, so that no index has to be touched.
WITH (fillfactor = 50);

COMMIT;

-- What the daemon's user needs:
--
--   CREATE ROLE "cm4all-spawn-reaper" LOGIN;
--   GRANT USAGE ON SCHEMA reaper TO "cm4all-spawn-reaper";
--   GRANT SELECT, INSERT ON reaper.release TO "cm4all-spawn-reaper";
--   GRANT SELECT, INSERT, UPDATE ON reaper.account_total TO "cm4all-spawn-reaper";
--
-- Rows may be deleted when nobody will send them again, and no report needs them; the totals stay:
--
--   DELETE FROM reaper.release WHERE released < now() - interval '90 days';

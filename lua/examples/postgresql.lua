-- What did each account use? In PostgreSQL, each release counted exactly once.
--
-- Every release becomes a row of the table "release", and is added to the row of its account in
-- "account_total". postgresql.sql makes both:
--
--   createdb accounting
--   psql -d accounting -f postgresql.sql
--
-- A handler waits for its query; the daemon does not. While the database is away, handlers wait for
-- it to come back, up to "running" of them, and the others in a queue (handlers in reaper.toml).

local conninfo = os.getenv("CONNINFO") or "dbname=accounting"
local schema = os.getenv("DATABASE_SCHEMA") or "reaper"

-- When the connection breaks during a query, nobody can tell whether it was carried out, and when
-- the script's process is replaced, handlers that wait begin again. It is safe to repeat this query:
-- it counts an id once.
local attempts = 3

local db = pg:new(conninfo, schema)

-- One statement, so it happens as a whole or not at all. "new" has a row only if the id was not in
-- the table before, and only then there is something to add to the total.
local RECORD = [[
  WITH new AS (
    INSERT INTO release (id, released, path, account, remainder, age, memory_peak,
                         cpu_total, cpu_user, cpu_system, oom, forks, io_read_bytes, io_write_bytes)
    VALUES ($1, to_timestamp($2), $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
    ON CONFLICT (id) DO NOTHING
    RETURNING *
  )
  INSERT INTO account_total AS total (account, releases, memory_peak, cpu_total, cpu_user,
                                      cpu_system, oom, forks, io_read_bytes, io_write_bytes)
  SELECT account, CASE WHEN remainder THEN 0 ELSE 1 END, memory_peak, coalesce(cpu_total, 0),
         coalesce(cpu_user, 0), coalesce(cpu_system, 0), coalesce(oom, 0), coalesce(forks, 0),
         coalesce(io_read_bytes, 0), coalesce(io_write_bytes, 0)
  FROM new
  ON CONFLICT (account) DO UPDATE SET
    releases = total.releases + excluded.releases,
    memory_peak = greatest(total.memory_peak, excluded.memory_peak),
    cpu_total = total.cpu_total + excluded.cpu_total,
    cpu_user = total.cpu_user + excluded.cpu_user,
    cpu_system = total.cpu_system + excluded.cpu_system,
    oom = total.oom + excluded.oom,
    forks = total.forks + excluded.forks,
    io_read_bytes = total.io_read_bytes + excluded.io_read_bytes,
    io_write_bytes = total.io_write_bytes + excluded.io_write_bytes
]]

-- The spawner sets the extended attribute "user.account" on NAME; NAME/SESSION has none of its own.
-- Without one, what runs in NAME is accounted to NAME.
local function account_of(cgroup)
  local path = cgroup.path
  repeat
    local account = cgroup.xattr.account
    if account then
      return account
    end
    cgroup = cgroup.parent
  until not cgroup
  return string.match(path, "%.scope/([^/]+)") or string.match(path, "[^/]+$")
end

-- Names and attributes may hold any byte, and PostgreSQL refuses text that is not UTF-8. So all
-- that is not plain ASCII becomes \xNN.
local function text(value)
  return (string.gsub(value, "[%c\\\128-\255]", function(character)
    return string.format("\\x%02x", string.byte(character))
  end))
end

function cgroup_released(cgroup)
  -- What is in "own" may be added up. What is in "cgroup" includes what the sessions of a NAME
  -- used, and was recorded for them already.
  local own = cgroup.own
  local id, account = cgroup.id, text(account_of(cgroup))
  local parameters = {
    id, os.time(), text(cgroup.path), account, cgroup.remainder, cgroup.age, cgroup.memory_peak,
    own.cpu_total, own.cpu_user, own.cpu_system, own.memory_events_oom, own.pids_forks,
    own.io_read_bytes, own.io_write_bytes,
    n = 14, -- the last ones may be nil, which Lua does not count
  }

  local result, err
  for _ = 1, attempts do
    result, err = db:execute(RECORD, parameters)
    if result then
      return
    end
  end
  -- The daemon logs this with the path; the usage itself is in the log line of the release.
  error("release " .. id .. " of account " .. account .. " is not in the database: " .. err)
end

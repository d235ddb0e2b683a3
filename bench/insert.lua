-- One row for each release, in a transaction of its own; the database is named by the environment
-- variable BENCH_DATABASE.  SIGHUP writes the number of handlers that have begun, and the line
-- "end", to the file named by BENCH_RECORDS.

local db = pg:new(os.getenv("BENCH_DATABASE"))
local begun = 0

-- The same statement as in database.py.
local INSERT = "INSERT INTO release (id, path, account, cpu_total, memory_peak) "
  .. "VALUES ($1, $2, $3, $4, $5)"

function cgroup_released(cgroup)
  begun = begun + 1
  assert(db:execute(INSERT, {
    cgroup.id, cgroup.path, cgroup.xattr.account, cgroup.own.cpu_total, cgroup.memory_peak, n = 5,
  }))
end

function reload()
  local file = assert(io.open(os.getenv("BENCH_RECORDS"), "w"))
  file:write(begun, "\nend\n")
  file:close()
end

-- Writes a line of JSON for every release to the file named by the environment variable RELEASES.
-- The path is in hexadecimal, since it may hold any byte.

local file = assert(io.open(os.getenv("RELEASES"), "a"))
file:setvbuf("line")

local function hex(bytes)
  return (bytes:gsub(".", function(c) return ("%02x"):format(c:byte()) end))
end

function cgroup_released(cgroup)
  file:write(('{"id": "%s", "path": "%s", "total": %.6f, "own": %.6f, "remainder": %s}\n'):format(
    cgroup.id, hex(cgroup.path), cgroup.cpu_total, cgroup.own.cpu_total, tostring(cgroup.remainder)))
end

-- Metrics for StatsD: one UDP datagram for each release.
--
--   spawn.alice.releases:1|c
--   spawn.alice.cpu_us:512345|c          CPU time in microseconds
--   spawn.alice.memory_peak:35651584|g   of the release that was last
--   ...
--
-- Counters come from "own", so the server may add them up. They are sent in microseconds because
-- many servers only take whole numbers: rounded to seconds, most short jobs would cost nothing.
-- Nobody is told when a datagram is lost; for bills, use postgresql.lua.

-- An address rather than a host name: looking one up would make the first handler wait.
local address = os.getenv("STATSD") or "127.0.0.1:8125"
local prefix = os.getenv("STATSD_PREFIX") or "spawn"

-- The spawner sets the extended attribute "user.account" on NAME; NAME/SESSION has none of its own.
local function account_of(cgroup)
  repeat
    local account = cgroup.xattr.account
    if account then
      return account
    end
    cgroup = cgroup.parent
  until not cgroup
  return "none"
end

-- Dots, colons, bars and newlines mean something in the protocol.
local function name_of(account)
  return (string.gsub(account, "[^%w_-]", "_"))
end

local statsd, complained

-- Returns true, or nil and the reason. When nobody listens, the kernel says so at the next send and
-- does not send that one: so every datagram gets a second try.
local function send(datagram)
  local err
  if not statsd then
    statsd, err = socket:connect(address, { type = "dgram" })
    if not statsd then
      return nil, err
    end
  end
  local connection = statsd
  local sent
  sent, err = connection:send(datagram)
  if not sent then
    sent, err = connection:send(datagram)
  end
  if not sent then
    return nil, err
  end
  return true
end

function cgroup_released(cgroup)
  local own = cgroup.own
  local base = prefix .. "." .. name_of(account_of(cgroup)) .. "."
  local lines = {}

  local function metric(name, value, kind)
    if value then -- nil where the kernel has no number
      lines[#lines + 1] = string.format("%s%s:%.0f|%s", base, name, value, kind)
    end
  end

  if not cgroup.remainder then
    metric("releases", 1, "c")
  end
  metric("cpu_us", own.cpu_total and own.cpu_total * 1000000, "c")
  metric("oom", own.memory_events_oom, "c")
  metric("io_read_bytes", own.io_read_bytes, "c")
  metric("io_write_bytes", own.io_write_bytes, "c")
  metric("memory_peak", cgroup.memory_peak, "g")
  metric("processes_peak", cgroup.pids_peak, "g")

  local ok, err = send(table.concat(lines, "\n"))
  if ok then
    complained = false
  elseif not complained then
    complained = true -- once, and not for each release until it works again
    error("no metrics: " .. err)
  end
end

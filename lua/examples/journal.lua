-- A structured record of each release in the systemd journal.
--
-- The fields can be searched and are kept apart from the text:
--
--   journalctl SYSLOG_IDENTIFIER=reaper-accounting REAPER_ACCOUNT=alice
--   journalctl SYSLOG_IDENTIFIER=reaper-accounting -o json --output-fields=REAPER_CPU_USEC
--
-- Only REAPER_CPU_USEC and the other fields that come from "own" may be added up;
-- REAPER_MEMORY_PEAK is a maximum. A field is missing where the kernel has no number.
--
-- The protocol is https://systemd.io/JOURNAL_NATIVE_PROTOCOL/: each record is one datagram.

local address = os.getenv("JOURNAL_SOCKET") or "/run/systemd/journal/socket"
local identifier = os.getenv("JOURNAL_IDENTIFIER") or "reaper-accounting"

-- The spawner sets the extended attribute "user.account" on NAME; NAME/SESSION has none of its own.
local function account_of(cgroup)
  repeat
    local account = cgroup.xattr.account
    if account then
      return account
    end
    cgroup = cgroup.parent
  until not cgroup
end

-- The size of a binary value: 64 bits, least significant byte first.
local function size64(size)
  local bytes = {}
  for i = 1, 8 do
    bytes[i] = string.char(size % 256)
    size = math.floor(size / 256)
  end
  return table.concat(bytes)
end

-- Names of cgroups and values of attributes may hold any byte. A newline would end the field, and
-- what follows it would be taken for the next one; the second form is safe for everything.
local function field(name, value)
  if string.find(value, "\n", 1, true) then
    return name .. "\n" .. size64(#value) .. value .. "\n"
  end
  return name .. "=" .. value .. "\n"
end

-- Returns a text for VALUE * SCALE, which is a whole number; nil for nil.
local function integer(value, scale)
  return value and string.format("%.0f", value * (scale or 1))
end

local journal

-- Returns true, or nil and the reason. If the journal's socket was made anew, the one that we have
-- leads nowhere: connect again and try once more.
local function send(record)
  local err
  for _ = 1, 2 do
    local connection = journal
    if not connection then
      connection, err = socket:connect(address, { type = "dgram" })
      if not connection then
        return nil, err
      end
      journal = connection
    end
    local sent
    sent, err = connection:send(record)
    if sent then
      return true
    end
    connection:close()
    if journal == connection then -- and not a new one already
      journal = nil
    end
  end
  return nil, err
end

function cgroup_released(cgroup)
  local own = cgroup.own
  local account = account_of(cgroup)
  local fields = {
    { "MESSAGE", string.format("%s used %.3f s of CPU time", cgroup.path, own.cpu_total or 0) },
    { "PRIORITY", "6" }, -- informational
    { "SYSLOG_IDENTIFIER", identifier },
    { "REAPER_ID", cgroup.id },
    { "REAPER_PATH", cgroup.path },
    { "REAPER_ACCOUNT", account },
    { "REAPER_REMAINDER", cgroup.remainder and "1" or "0" },
    { "REAPER_AGE_USEC", integer(cgroup.age, 1000000) },
    { "REAPER_CPU_USEC", integer(own.cpu_total, 1000000) },
    { "REAPER_CPU_USER_USEC", integer(own.cpu_user, 1000000) },
    { "REAPER_CPU_SYSTEM_USEC", integer(own.cpu_system, 1000000) },
    { "REAPER_MEMORY_PEAK", integer(cgroup.memory_peak) },
    { "REAPER_MEMORY_OOM", integer(own.memory_events_oom) },
    { "REAPER_IO_READ_BYTES", integer(own.io_read_bytes) },
    { "REAPER_IO_WRITE_BYTES", integer(own.io_write_bytes) },
  }

  local record = {}
  for _, pair in ipairs(fields) do
    if pair[2] then
      record[#record + 1] = field(pair[1], pair[2])
    end
  end

  local ok, err = send(table.concat(record))
  if not ok then
    error("no record in the journal: " .. err)
  end
end

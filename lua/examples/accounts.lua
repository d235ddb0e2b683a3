-- What did each account use?
--
-- Prints one line for each released cgroup, and at SIGHUP one line for each account with the sums
-- since the start:
--
--   released account=alice path=/.../alice-blog/fcgi-1 cpu=0.512345 memory_peak=35651584 id=...
--   total account=alice releases=14 cpu=2.345678 memory_peak=67108864
--
-- Between the fields are tabs, times are in seconds, memory is in bytes, and "-" stands for what
-- there is not: no account, or a number that this kernel does not have. Under systemd the lines
-- are in the journal:
--
--   systemctl reload cm4all-spawn-reaper     (prints the sums)
--   journalctl -u cm4all-spawn-reaper -o cat | grep -P '^total\t'
--
-- The sums live in this script's memory: they begin anew when the daemon is restarted, or when the
-- script's process is replaced. The lines remain; one that is there twice has the same id.

-- A cgroup's name may hold any byte but NUL, newline and "/", an attribute any byte at all. Written
-- as they are, a tab would forge a field and a newline a line. So these (and all that is not ASCII,
-- since nobody promises that it is UTF-8) become \xNN.
local function field(value)
  if value == nil then
    return "-"
  elseif value == "-" then
    return "\\x2d" -- somebody who is really called that
  end
  return (string.gsub(value, "[%c\\\128-\255]", function(character)
    return string.format("\\x%02x", string.byte(character))
  end))
end

local function number(format, value)
  return value and string.format(format, value) or "-"
end

-- The spawner sets the extended attribute "user.account" on NAME. What ran in NAME/SESSION, or
-- deeper, has none of its own and belongs to the same account.
local function account_of(cgroup)
  repeat
    local account = cgroup.xattr.account
    if account then
      return account
    end
    cgroup = cgroup.parent
  until not cgroup
end

local totals = {} -- by account, as it is printed

local function total_of(account)
  local total = totals[account]
  if not total then
    total = { releases = 0, cpu = 0 }
    totals[account] = total
  end
  return total
end

function cgroup_released(cgroup)
  local account = field(account_of(cgroup))
  local total = total_of(account)

  -- cgroup.cpu_total is the kernel's number: that of NAME holds the CPU time of its sessions too,
  -- which were released (and came by here) before it. cgroup.own.cpu_total leaves out whatever
  -- was reported already. Only numbers of "own" may be added up.
  local cpu = cgroup.own.cpu_total
  total.cpu = total.cpu + (cpu or 0)

  -- A peak is not a sum: what counts for an account is its highest. nil without the memory
  -- controller, and before Linux 5.19.
  local memory_peak = cgroup.memory_peak
  if memory_peak and memory_peak > (total.memory_peak or 0) then
    total.memory_peak = memory_peak
  end

  -- A remainder is the CPU time that was used between a cgroup's record and its deletion: a bit
  -- more of what was here a moment ago. It must be paid for, but nothing else was released.
  local kind = "remainder"
  if not cgroup.remainder then
    kind = "released"
    total.releases = total.releases + 1
  end

  print(table.concat({
    kind,
    "account=" .. account,
    "path=" .. field(cgroup.path),
    "cpu=" .. number("%.6f", cpu),
    "memory_peak=" .. number("%.0f", memory_peak),
    "id=" .. cgroup.id, -- differs for each call: whoever reads one twice can tell
  }, "\t"))
end

-- The daemon calls this for SIGHUP.
function reload()
  for account, total in pairs(totals) do
    print(table.concat({
      "total",
      "account=" .. account,
      "releases=" .. total.releases,
      "cpu=" .. number("%.6f", total.cpu),
      "memory_peak=" .. number("%.0f", total.memory_peak),
    }, "\t"))
  end
end

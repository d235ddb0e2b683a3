-- What does each release cost? With a price list in PostgreSQL that may change at any time.
--
--   cost account=alice path=/.../alice-blog/fcgi-1 cost=0.000005123 cpu=0.512345 id=...
--
-- prices.sql makes the table "price", and a trigger that says NOTIFY prices when it changes. The
-- list is loaded before the first release is handled, after each NOTIFY, after a lost connection
-- was made again (there may have been a NOTIFY meanwhile), and by hand:
--
--   systemctl reload cm4all-spawn-reaper
--
-- If that fails, it is reported, and the list from before stays in force.

local conninfo = os.getenv("CONNINFO") or "dbname=accounting"
local schema = os.getenv("DATABASE_SCHEMA") or "reaper"

local db = pg:new(conninfo, schema)

local prices -- by name of a counter; nil until they were loaded

local function load_prices()
  local result, err = db:execute("SELECT counter, price FROM price")
  if not result then
    error("cannot load the prices: " .. err)
  end
  local list, count = {}, 0
  local row = result:fetch({}, "a")
  while row do
    list[row.counter] = tonumber(row.price)
    count = count + 1
    row = result:fetch(row, "a")
  end
  prices = list -- only when it is complete
  print("loaded " .. count .. " prices")
end

db:listen("prices", load_prices)

-- The daemon calls this for SIGHUP.
function reload()
  load_prices()
end

-- The spawner sets the extended attribute "user.account" on NAME; NAME/SESSION has none of its own.
local function account_of(cgroup)
  repeat
    local account = cgroup.xattr.account
    if account then
      return account
    end
    cgroup = cgroup.parent
  until not cgroup
  return "-"
end

-- A name or an attribute may hold any byte: what is printed must stay one line of fields.
local function field(value)
  return (string.gsub(value, "[%c%s\\\128-\255]", function(character)
    return string.format("\\x%02x", string.byte(character))
  end))
end

function cgroup_released(cgroup)
  -- Before anything that waits: the cgroup is deleted meanwhile, and its parents may be.
  local own = cgroup.own
  local account = account_of(cgroup)

  -- The first handlers do this, rather than the main chunk: the start of the daemon would wait for
  -- a database that is away.
  if not prices then
    load_prices()
  end

  local cost = 0
  for counter, price in pairs(prices) do
    cost = cost + (own[counter] or 0) * price -- nil where the kernel has no number
  end
  print(string.format("cost account=%s path=%s cost=%.9f cpu=%.6f id=%s",
    field(account), field(cgroup.path), cost, own.cpu_total or 0, cgroup.id))
end

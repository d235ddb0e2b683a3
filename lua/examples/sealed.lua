-- Encrypted records: this host can write them, but only the owner of the secret key can read them.
--
-- Each release becomes one line of hexadecimal digits on a stream socket: a sealed box (libsodium)
-- with a JSON object in it. Whoever collects the lines, or takes this host over later, learns
-- nothing from them.
--
-- 1. Make a pair of keys, on the machine where the records will be read:
--
--      cm4all-spawn-reaper --check --lua open_sealed.lua
--
-- 2. Give the public key to this script, here or as PUBLIC_KEY in the daemon's environment
--    (systemctl edit cm4all-spawn-reaper).
--
-- 3. Let something append what comes in at the socket to a file:
--
--      socat -u UNIX-LISTEN:/run/records.socket,fork,mode=0666 OPEN:records,creat,append
--
-- 4. Read them where the secret key is:
--
--      SECRET_KEY=$(cat secret) cm4all-spawn-reaper --check --lua open_sealed.lua < records

local address = os.getenv("RECORDS") or "/run/records.socket"
local key = os.getenv("PUBLIC_KEY") or ""

local public_key = sodium.hex2bin(key)
if not public_key or #public_key ~= 32 then
  error("PUBLIC_KEY must be 64 hexadecimal digits")
end

-- JSON is UTF-8, and a path or an attribute may hold any byte: each that is not plain ASCII becomes
-- the character with its number, so that nothing is lost.
local function quote(value)
  return '"' .. string.gsub(value, '[%c"\\\127-\255]', function(character)
    return string.format("\\u%04x", string.byte(character))
  end) .. '"'
end

local function json(value)
  if type(value) == "string" then
    return quote(value)
  elseif type(value) == "number" then
    return string.format("%.14g", value)
  end
  return tostring(value) -- true, false
end

-- Returns FIELDS, pairs of name and value, as an object; without those that are nil.
local function object(fields)
  local members = {}
  for _, pair in ipairs(fields) do
    if pair[2] ~= nil then
      members[#members + 1] = quote(pair[1]) .. ": " .. json(pair[2])
    end
  end
  return "{" .. table.concat(members, ", ") .. "}"
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
end

local records

-- Returns true, or nil and the reason. After an error in a stream it cannot be known how much of
-- the line arrived, so it is sent whole on a new connection. A torn line does not open, and a
-- record that arrives twice has the same id.
local function send(line)
  local err
  for _ = 1, 2 do
    local connection = records
    if not connection then
      connection, err = socket:connect(address)
      if not connection then
        return nil, err
      end
      if records then -- another handler was faster, while this one waited
        connection:close()
        connection = records
      end
      records = connection
    end
    local sent
    sent, err = connection:send(line)
    if sent then
      return true
    end
    connection:close()
    if records == connection then -- and not a new one already
      records = nil
    end
  end
  return nil, err
end

function cgroup_released(cgroup)
  local own = cgroup.own
  local record = object({
    { "id", cgroup.id },
    { "time", os.time() },
    { "account", account_of(cgroup) },
    { "path", cgroup.path },
    { "remainder", cgroup.remainder },
    { "cpu", own.cpu_total },
    { "memory_peak", cgroup.memory_peak },
    { "oom", own.memory_events_oom },
  })
  local sealed = sodium.crypto_box_seal(record, public_key)
  local ok, err = send(sodium.bin2hex(sealed) .. "\n")
  if not ok then
    error("no record: " .. err)
  end
end

-- Replaces the child processes of an application that ran out of memory.
--
-- When a process was denied memory, its siblings that serve the same application are often about
-- to be. This tells beng-proxy to fade them: they finish what they are doing, get nothing new, and
-- are replaced by fresh ones.
--
-- Needs the memory controller. Without it there are no numbers, and this script does nothing.

-- Looked up once, at the start: a wrong address shows then, and no handler waits for it.
local server = control_resolve(os.getenv("CONTROL") or "@bp-control")
local attribute = os.getenv("TAG_ATTRIBUTE") or "account" -- user.ATTRIBUTE holds the child tag
local interval = tonumber(os.getenv("INTERVAL") or 60) -- seconds for which a tag is left alone

-- The spawner sets the attribute on NAME; NAME/SESSION has none of its own.
local function tag_of(cgroup)
  repeat
    local tag = cgroup.xattr[attribute]
    if tag then
      return tag
    end
    cgroup = cgroup.parent
  until not cgroup
end

-- A name or an attribute may hold any byte: what is printed must stay one line.
local function printable(text)
  return (string.gsub(text, "%c", "?"))
end

local control

-- Returns true, or nil and the reason. If beng-proxy was restarted, the client that we have leads
-- nowhere: make a new one and try once more.
local function fade(tag)
  local err
  for _ = 1, 2 do
    local client = control
    if not client then
      client, err = control_client:new(server)
      if not client then
        return nil, err
      end
      control = client
    end
    local ok
    ok, err = client:send(client:build():fade_children(tag))
    if ok then
      return true
    end
    control = nil
  end
  return nil, err
end

local faded = {} -- by tag: when

function cgroup_released(cgroup)
  -- "own", because cgroup.memory_events_oom of NAME counts its sessions, too, for each of which
  -- this function has been called already.
  local oom = cgroup.own.memory_events_oom
  if not oom or oom == 0 then
    return
  end

  local path = printable(cgroup.path)
  local tag = tag_of(cgroup)
  if not tag then
    print(path .. " ran out of memory and has no user." .. attribute)
    return
  end

  -- What runs out of memory again and again is not helped by starting it ever faster.
  local now = os.time()
  if faded[tag] and now < faded[tag] + interval then
    return
  end
  faded[tag] = now

  local ok, err = fade(tag)
  if not ok then
    faded[tag] = nil
    error("cannot tell " .. tostring(server) .. " to fade " .. printable(tag) .. ": " .. err)
  end
  print(path .. " ran out of memory, faded the children of " .. printable(tag))
end

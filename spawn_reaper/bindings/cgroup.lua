-- The object that cgroup_released() gets, its parents and their xattr tables.
--
-- Called once with four functions of cgroup.py and the names of the fields that every release brings
-- along, in their order: first TIMES of them in microseconds, up to COUNTERS those that may be added
-- up, then the others. Returns new(subject, ...), which takes those fields, and close(object), which
-- makes everything that was got from it stale.

local read_pressure, read_own, read_xattr, read_parent, times, counters = ...

local error, getmetatable, newproxy, setmetatable, type =
    error, getmetatable, newproxy, setmetatable, type
local find, match = string.find, string.match

local names = { select(7, ...) }
local position = {}
for i, name in ipairs(names) do
  position[name] = i
end

local PRESSURE = { cpu_pressure = true, memory_pressure = true, io_pressure = true }

-- What an object is about; weak, so that a state lives as long as its object.
local states = setmetatable({}, { __mode = "k" })

-- A release's state holds its fields by position. All that is derived from it points to it as
-- "life": when that has ended, so have they.
local function state_of(object)
  local state = states[object]
  if not state then
    error("not a cgroup object", 3)
  elseif state.life.ended then
    error("Stale object", 3)
  end
  return state
end

local function read_only()
  error("cgroup objects are read-only", 2)
end

local function describe(object)
  local state = state_of(object)
  return state.path or state[position.path]
end

local function class(index)
  local prototype = newproxy(true)
  local meta = getmetatable(prototype)
  meta.__index = index
  meta.__newindex = read_only
  meta.__tostring = describe
  meta.__metatable = "cgroup"
  return prototype
end

local function derived(object, life, fields)
  fields.life = life
  states[object] = fields
  return object
end

-- LEVEL counts the parents up from the released cgroup, which is 0.
local xattr_meta = {
  __index = function(self, key)
    local state = state_of(self)
    if type(key) ~= "string" then
      return nil
    end
    local name = find(key, ".", 1, true) and key or "user." .. key
    return read_xattr(state.life.subject, state.level, state.path, name)
  end,
  __newindex = read_only,
  __metatable = "xattr",
}

local function xattr_of(life, level, path)
  return setmetatable(derived({}, life, { level = level, path = path }), xattr_meta)
end

local parent_prototype

local function parent_of(life, level, path)
  local parent_path = match(path, "^(.+)/[^/]*$")
  if not parent_path then
    return nil
  end
  return derived(newproxy(parent_prototype), life, { level = level + 1, path = parent_path })
end

parent_prototype = class(function(self, key)
  local state = state_of(self)
  if key == "path" then
    return state.path
  elseif key == "parent" then
    return parent_of(state.life, state.level, state.path)
  elseif key == "xattr" then
    return xattr_of(state.life, state.level, state.path)
  elseif type(key) == "string" then
    return read_parent(state.path, key)
  end
end)

-- Scripts see seconds.
local function value_of(values, i)
  local value = values[i]
  return value and i <= times and value / 1000000 or value
end

local function own_of(subject)
  local values, own = { read_own(subject) }, {}
  for i = 1, counters do
    own[names[i]] = value_of(values, i)
  end
  return own
end

local release_prototype = class(function(self, key)
  local state = state_of(self)
  local i = position[key]
  if i then
    return value_of(state, i)
  elseif key == "xattr" then
    return xattr_of(state, 0, state[position.path])
  elseif key == "parent" then
    return parent_of(state, 0, state[position.path])
  elseif key == "own" then
    return own_of(state.subject)
  elseif PRESSURE[key] then
    return read_pressure(state.subject, key)
  end
end)

local function new(subject, ...)
  local state = { subject = subject, ... }
  state.life = state
  local object = newproxy(release_prototype)
  states[object] = state
  return object
end

local function close(object)
  states[object].ended = true
end

return new, close

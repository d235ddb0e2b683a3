-- The object that cgroup_released() gets, its parents and their xattr tables.
--
-- Called once with two functions of cgroup.py and the names of the fields that every release
-- brings along, in their order: first TIMES of them in microseconds, up to COUNTERS those that may be
-- added up, then the others. Returns new(attempt, ...), which takes those fields and what follows them,
-- and close(object), which makes everything that was got from the object stale.

local read_xattr, read_field, times, counters = ...

local error, getmetatable, newproxy, setmetatable, type =
    error, getmetatable, newproxy, setmetatable, type
local find, match, sub = string.find, string.match, string.sub

local names = { select(5, ...) }
local position = {}
for i, name in ipairs(names) do
  position[name] = i
end

-- What follows the fields: the counters of "own", three pressures, the number of levels whose
-- attributes were copied, the number of levels whose inodes are known, those inodes, and the level,
-- name and value of each attribute.
local OWN = #names
local PRESSURES = OWN + counters
local LEVELS = PRESSURES + 4
local INODES = LEVELS + 1

local PRESSURE = { cpu_pressure = 1, memory_pressure = 2, io_pressure = 3 }

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
local function copied_attribute(release, level, name)
  local i = INODES + release[INODES] + 1
  while release[i] do
    if release[i] == level and release[i + 1] == name then
      return release[i + 2]
    end
    i = i + 3
  end
end

-- Nil where it is not known: then nothing can be read.
local function inode_of(release, level)
  return level < release[INODES] and release[INODES + 1 + level] or nil
end

local xattr_meta = {
  __index = function(self, key)
    local state = state_of(self)
    if type(key) ~= "string" then
      return nil
    end
    local name = find(key, ".", 1, true) and key or "user." .. key
    if sub(name, 1, 5) == "user." and state.level < state.life[LEVELS] then
      return copied_attribute(state.life, state.level, name)
    end
    local inode = inode_of(state.life, state.level)
    return inode and read_xattr(state.path, inode, name)
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
    local inode = inode_of(state.life, state.level)
    return inode and read_field(state.path, inode, key)
  end
end)

local function pressure_of(state, key)
  local value = state[PRESSURES + PRESSURE[key]]
  if value then
    return value / 1000000
  end
  local inode = inode_of(state, 0)
  return inode and read_field(state[position.path], inode, key)
end

local function own_of(state)
  local own = {}
  for i = 1, counters do
    local value = state[OWN + i]
    own[names[i]] = value and i <= times and value / 1000000 or value
  end
  return own
end

local release_prototype = class(function(self, key)
  local state = state_of(self)
  local i = position[key]
  if i then
    local value = state[i]
    return value and i <= times and value / 1000000 or value -- scripts see seconds
  elseif key == "xattr" then
    return xattr_of(state, 0, state[position.path])
  elseif key == "parent" then
    return parent_of(state, 0, state[position.path])
  elseif key == "own" then
    return own_of(state)
  elseif key == "attempt" then
    return state.attempt
  elseif PRESSURE[key] then
    return pressure_of(state, key)
  end
end)

local function new(attempt, ...)
  local state = { ... }
  state.attempt = attempt
  state.life = state
  local object = newproxy(release_prototype)
  states[object] = state
  return object
end

local function close(object)
  states[object].ended = true
end

return new, close

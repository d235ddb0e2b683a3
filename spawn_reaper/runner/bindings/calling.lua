-- The Lua side of calling.py: how a script calls what we give it. Nothing else in the bindings knows
-- about argument checks, the errors for them, waiting, or userdata.
--
-- Called once with the table that script.lua returns, and functions of calling.py: one drops an object
-- of Python's, one runs an operation while everything waits, one gives the text of an object, and one is
-- told of every call, or nil. Returns a table of functions.

local runtime, drop, block, describe, trace = ...

local can_wait, guarded, placed = runtime.can_wait, runtime.guarded, runtime.placed
describe = guarded(describe)
local task_number, wait = runtime.task_number, runtime.wait

local ceil, error, floor, format = math.ceil, error, math.floor, string.format
local getmetatable, newproxy, rawequal, rawset, select =
    getmetatable, newproxy, rawequal, rawset, select
local setmetatable, tonumber, tostring, type = setmetatable, tonumber, tostring, type
local concat, gmatch, match, sub, unpack =
    table.concat, string.gmatch, string.match, string.sub, unpack

-- How a call ended; the same numbers as in calling.py.
local RETURN, FAIL, RAISE, WAIT, NEW, SELF = 0, 1, 2, 3, 4, 5

local LARGEST = 2 ^ 53 -- no string is longer, no double more exact

-- Objects: a userdata for each, which stands for one of Python's.
local handles = setmetatable({}, { __mode = "k" }) -- userdata -> number that calling.py knows
local class_of = setmetatable({}, { __mode = "k" }) -- userdata -> name of its class
local prototypes = {} -- name of a class -> userdata to make others from
local collected = {} -- numbers of objects that Lua has collected

local function raise(...)
  error(placed(format(...)), 0)
end

local function type_name(value)
  return class_of[value] or type(value)
end

-- Arguments. A converter returns what Python gets, or nil for "not that type".

local converters = {
  string = function(value)
    return type(value) == "string" and value or type(value) == "number" and tostring(value) or nil
  end,
  ["number|string"] = function(value)
    return (type(value) == "string" or type(value) == "number") and value or nil
  end,
  integer = function(value, name, position)
    local number = tonumber(value)
    if not number or type(value) == "table" then
      return nil
    elseif number ~= number or number == 1 / 0 or number == -1 / 0 then
      raise("bad argument #%d to '%s' (number has no integer representation)", position, name)
    elseif number > LARGEST or number < -LARGEST then
      return number > 0 and LARGEST or -LARGEST
    end
    return number < 0 and ceil(number) or floor(number)
  end,
  table = function(value)
    return type(value) == "table" and value or nil
  end,
  ["function"] = function(value)
    return type(value) == "function" and value or nil
  end,
}

local EXPECTED = { integer = "number", ["number|string"] = "string" }

-- A kind is the name of a converter or of a class, or one of each ("address|string").
local function converter_of(kind)
  if converters[kind] then
    return converters[kind]
  end
  local class, other = match(kind, "^([^|]+)|?(.*)$")
  other = converters[other]
  return function(value, ...)
    if class_of[value] == class then
      return handles[value]
    end
    return other and other(value, ...)
  end
end

-- KINDS is a list in one string: "string integer? string...", where the last may come any number of
-- times, or not at all. FIRST is the position of the first.
local function checker(name, kinds, first)
  local list, optional, rest = {}, {}, nil
  for kind, mark in gmatch(kinds, "([^ ?.]+)([?.]*)") do
    local expected = {
      name = EXPECTED[kind] or match(kind, "[^|]+$"),
      convert = converter_of(kind),
    }
    if mark == "..." then
      rest = expected
    else
      list[#list + 1] = expected
      optional[#list] = mark == "?"
    end
  end
  local count = #list

  local function check(i, value, given)
    local expected = list[i] or rest
    if value == nil and optional[i] then
      return nil
    end
    local converted
    if value ~= nil then
      converted = expected.convert(value, name, first + i - 1)
    end
    if converted == nil then
      raise(
        "bad argument #%d to '%s' (%s expected, got %s)",
        first + i - 1, name, expected.name,
        given < i and "no value" or type_name(value)
      )
    end
    return converted
  end

  local function check_all(given, ...)
    local arguments = { ... }
    for i = 1, given > count and given or count do
      arguments[i] = check(i, arguments[i], given)
    end
    return unpack(arguments, 1, given > count and given or count)
  end

  return function(...)
    local given = select("#", ...)
    if given > count and not rest then
      raise("too many arguments to '%s' (%d expected, got %d)", name, first + count - 1,
        first + given - 1)
    elseif count == 0 then
      return
    elseif count == 1 and given <= 1 then
      return check(1, (...), given)
    end
    return check_all(given, ...)
  end
end

-- Results.

-- Finalizers run in the middle of anything, even while the interpreter is closed; so they only take
-- note.
local function drop_collected()
  if collected[1] then
    local numbers = collected
    collected = {}
    for i = 1, #numbers do
      drop(numbers[i])
    end
  end
end

local function new(class, handle)
  drop_collected()
  local object = newproxy(prototypes[class])
  handles[object] = handle
  class_of[object] = class
  return object
end

local function results(self, outcome, ...)
  if outcome == RETURN then
    return ...
  elseif outcome == SELF then
    return self
  elseif outcome == FAIL then
    return nil, (...)
  elseif outcome == NEW then
    return new(...)
  elseif outcome == WAIT then
    if can_wait() then
      return results(self, wait(...))
    end
    return results(self, block(...))
  end
  raise("%s", (...))
end

-- Traces.

local function show(value)
  if type(value) == "string" then
    return format("%q", #value > 60 and sub(value, 1, 57) .. "..." or value)
  end
  return class_of[value] and tostring(value) or type(value) == "table" and "{...}" or tostring(value)
end

-- Returns the values as one string.
local function list_of(...)
  local shown = {}
  for i = 1, select("#", ...) do
    shown[i] = show((select(i, ...)))
  end
  return concat(shown, ", ")
end

local function list_without_self(_, ...)
  return list_of(...)
end

-- Tells of a call when it has returned. SHOWN is the name that the script knows, ARGUMENTS shows the
-- arguments.
local function traced(shown, arguments_of, call)
  if not trace then
    return call
  end
  local function tell(place, arguments, ...)
    trace(place, shown, arguments, list_of(...))
    return ...
  end
  return function(...)
    return tell(placed(""), arguments_of(...), call(...))
  end
end

-- Functions. CALL is Python's, or for one that has to wait: takes the number of the task first.

local function with_task(name, call)
  return function(handle, ...)
    if not can_wait() then
      raise("%s() cannot wait here, below require, dofile or a function that Lua itself called", name)
    end
    return call(handle, task_number(), ...)
  end
end

-- SHOWN is how the script calls the function NAME.
local function bind(name, kinds, call, shown)
  local check = checker(name, kinds, 1)
  call = guarded(call)
  return traced(shown, list_of, function(...)
    return results(nil, call(check(...)))
  end)
end

local function bind_method(name, kinds, call, has_to_wait, class, is_self)
  local check = checker(name, kinds, 2)
  call = guarded(call)
  call = has_to_wait and with_task(name, call) or call
  local function method(self, ...)
    local handle = is_self(self)
    if not handle then
      raise("bad argument #1 to '%s' (%s expected, got %s)", name, class, type_name(self))
    end
    return results(self, call(handle, check(...)))
  end
  return traced(match(class, "^%S+") .. ":" .. name, list_without_self, function(...)
    if select("#", ...) == 0 then
      raise("bad argument #1 to '%s' (%s expected, got no value)", name, class)
    end
    return method(...)
  end)
end

-- A table whose functions are called with ":", as Python's object HANDLE.
local function module(name, handle)
  local self = {}
  local function is_self(value)
    return rawequal(value, self) and handle
  end
  local function add(method, kinds, call, has_to_wait)
    self[method] = bind_method(method, kinds, call, has_to_wait, name .. " module", is_self)
  end
  return self, add
end

-- A class, whose objects are made by results.
local function class(name)
  local prototype = newproxy(true)
  local meta = getmetatable(prototype)
  local methods = {}
  meta.__index = methods
  meta.__metatable = name
  meta.__gc = function(object)
    collected[#collected + 1] = handles[object]
  end
  meta.__tostring = function(object)
    return handles[object] and describe(handles[object]) or name
  end
  prototypes[name] = prototype
  local function is_self(value)
    return class_of[value] == name and handles[value]
  end
  return function(method, kinds, call, has_to_wait)
    methods[method] = bind_method(method, kinds, call, has_to_wait, name, is_self)
  end
end

-- Sets pairs of keys and values, which follow the table. Python must not: an error in a metamethod
-- would go right through it.
local function fill(table, ...)
  table = table or {}
  for i = 1, select("#", ...), 2 do
    local key, value = select(i, ...)
    rawset(table, key, value)
  end
  return table
end

return {
  bind = bind,
  class = class,
  drop_collected = drop_collected,
  fill = fill,
  module = module,
  type_name = type_name,
}

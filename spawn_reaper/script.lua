-- The Lua side of script.py: runs handlers as coroutines, under limits.
--
-- Called once with the limits and a function that takes (path, message) when a handler fails.
-- Returns the functions that script.py calls. Whatever the script may replace later (coroutine,
-- error, ...) is kept in locals.

local cpu_limit, memory_limit, failed = ...

local clock, collectgarbage, error, loadstring = os.clock, collectgarbage, error, loadstring
local create, resume, status, yield =
    coroutine.create, coroutine.resume, coroutine.status, coroutine.yield
local getinfo, sethook = debug.getinfo, debug.sethook
local format, match, sub = string.format, string.match, string.sub
local rawget, setmetatable, type, xpcall = rawget, setmetatable, type, xpcall
local globals = _G

-- With the JIT on, compiled loops never reach the count hook.
jit.off()
jit.flush()
jit.on = function() end

-- Python is an implementation detail of ours, not of the scripts.
globals.python = nil
package.loaded.python = nil

-- A pipe would be buffered in blocks.
io.stdout:setvbuf("line")

-- A script that could end the daemon would end it in the middle of a batch.
os.exit = function()
  error("os.exit() is not available: the daemon goes on", 2)
end

-- The only hook there is, and it is ours.
debug.sethook = function()
  error("debug.sethook() is not available: the limits on handlers need the hook", 2)
end

-- Puts file and line of the innermost function of the script before a message.
local function placed(message)
  local level = 2
  while true do
    local info = getinfo(level, "Sl")
    if not info then
      return message
    end
    if sub(info.source, 1, 1) == "@" and info.currentline > 0 then
      return format("%s:%d: %s", info.short_src, info.currentline, message)
    end
    level = level + 1
  end
end

local INSTRUCTIONS = 1000 -- between two looks at the limits
local OURS = getinfo(1, "S").source
local limited = false -- a handler runs, and not our own work for it
local strict = false -- a handler has used up its CPU time
local cpu_end = 0

local function check()
  if not limited or getinfo(2, "S").source == OURS then
    return -- what happens in this file is not the script's fault
  end
  if clock() > cpu_end then
    -- From now on every instruction of the script fails, so that no pcall in it can go on.
    strict = true
    sethook(check, "", 1)
    error(placed(format("used more than %g s of CPU time", cpu_limit)), 0)
  end
  if collectgarbage("count") * 1024 > memory_limit then
    collectgarbage()
    if collectgarbage("count") * 1024 > memory_limit then
      error(placed(format("used more than %g MB of memory", memory_limit / 1000000)), 0)
    end
  end
end

-- The hook stays: taking it away and back for each handler would cost more than leaving it.
sethook(check, "", INSTRUCTIONS)

local function unlimit()
  limited = false
  if strict then
    strict = false
    sethook(check, "", INSTRUCTIONS)
  end
end

-- Turns any error value into a string that begins with file and line.
local function locate(value)
  local message = type(value) == "string" and value
    or format("(error object is a %s value)", type(value))
  return match(message, "^[^\n]-:%d+: ") and message or placed(message)
end

local OPERATION = {} -- what await() yields first, so that it differs from the script's own yields

-- Suspends the running handler until Python has finished OPERATION. Returns its results; an
-- operation that failed in a way that a script must not ignore raises.
local function await(operation)
  local function results(ok, ...)
    if not ok then
      error((...), 2) -- tail calls have left no other frame of ours
    end
    return ...
  end
  return results(yield(OPERATION, operation))
end

-- The states that a slice ends in; script.py knows the numbers.
local DONE, PARKED, WAITING = 0, 1, 2

local function slice(co, ...)
  cpu_end = clock() + cpu_limit
  limited = true
  local _, marker, operation = resume(co, ...)
  unlimit()
  if status(co) == "dead" then
    return DONE
  elseif marker == OPERATION then
    return WAITING, co, operation
  end
  return PARKED
end

-- How to end the coroutines that wait for an operation, from outside.
local closers = setmetatable({}, { __mode = "k" })

-- Returns a function that runs HANDLER in a coroutine of its own, up to its end or its first yield.
-- What that function takes, after the path for failed(), goes to NEW, which makes HANDLER's argument;
-- CLOSE is called with the argument when the handler has ended, however that came about.
local function starter(handler, new, close)
  return function(path, ...)
    local object = new and new(...)

    local co = create(function()
      local ok, message = xpcall(handler, locate, object)
      unlimit()
      if close then
        close(object)
      end
      if not ok then
        failed(path, message)
      end
      limited = true -- whoever resumed it, if that was not us
      if not ok then
        error(message, 0)
      end
    end)

    local state, _, operation = slice(co)
    if state ~= WAITING then
      return state
    end
    closers[co] = close and function() close(object) end
    return state, co, operation
  end
end

-- Gives up a coroutine that will not be resumed any more.
local function abandon(co)
  if closers[co] then
    closers[co]()
  end
end

local function compile(code, name)
  return loadstring(code, "@" .. name)
end

local function global(name)
  local value = rawget(globals, name)
  return value, type(value)
end

return starter, slice, abandon, await, compile, global

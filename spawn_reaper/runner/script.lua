-- The Lua side of script.py: runs the script's functions as coroutines, under limits.
--
-- Called once with the limits, a function that takes (path, message) when a handler fails, and one
-- that takes (number of the task, path, release, operation) when a task begins to wait. Returns a table
-- of what script.py and the bindings need. Whatever the script may replace later (coroutine, error, ...) is
-- kept in locals.

local cpu_limit, memory_limit, failed, suspended = ...

local clock, collectgarbage, error, loadstring = os.clock, collectgarbage, error, loadstring
local create, isyieldable, resume, running, status, yield =
    coroutine.create, coroutine.isyieldable, coroutine.resume, coroutine.running,
    coroutine.status, coroutine.yield
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

-- Handlers that wait would be lost with the process.
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

local INSTRUCTIONS = 997 -- between two looks at the limits; a prime, so that loops do not hide
local OURS = { ["=script.lua"] = true, ["=calling.lua"] = true, ["=cgroup.lua"] = true }
local limited = false -- a handler runs, and not our own work for it
local strict = false -- the hook runs at every instruction
local exceeded = false -- a limit was, in this slice
local cpu_end = 0

local check

local function every(instructions)
  strict = instructions == 1
  sethook(check, "", instructions)
end

local function used_too_much_memory()
  return collectgarbage("count") * 1024 > memory_limit
end

check = function()
  if not limited then
    return
  end
  local late = clock() > cpu_end
  if OURS[getinfo(2, "S").source] then
    -- Our files must not be left in the middle of something: at the script's next instruction.
    if (late or used_too_much_memory()) and not strict then
      every(1)
    end
  elseif late then
    -- From now on every instruction of the script fails, so that no pcall in it can go on.
    exceeded = true
    every(1)
    error(placed(format("used more than %g s of CPU time", cpu_limit)), 0)
  elseif used_too_much_memory() then
    collectgarbage()
    if used_too_much_memory() then
      exceeded = true
      error(placed(format("used more than %g MB of memory", memory_limit / 1000000)), 0)
    end
  elseif strict then
    every(INSTRUCTIONS)
  end
end

-- The hook stays: taking it away and back for each handler would cost more than leaving it.
every(INSTRUCTIONS)

local function unlimit()
  limited, exceeded = false, false
  if strict then
    every(INSTRUCTIONS)
  end
end

-- The script's message handlers do not run for what a limit has ended: no hook reaches into them.
globals.xpcall = function(body, handler, ...)
  return xpcall(body, function(...)
    if exceeded then
      return (...)
    end
    return handler(...)
  end, ...)
end

-- Turns any error value into a string that begins with file and line.
local function locate(value)
  local message = type(value) == "string" and value
    or format("(error object is a %s value)", type(value))
  return match(message, "^[^\n]-:%d+: ") and message or placed(message)
end

-- Tasks. A task is a coroutine in which a function of the script was started by us: a handler, the
-- main chunk, reload. It may wait for operations; other coroutines of the script wait as part of it.

local function weak()
  return setmetatable({}, { __mode = "k" })
end

local OPERATION = {} -- what is yielded by a wait, so that it differs from the script's own yields
local WAITS = "cannot resume a coroutine that waits for an operation"
local DEEPEST = 190 -- coroutines that resume each other; LuaJIT crashes soon after

-- The state that a slice ends in; any greater number is that of the task, which waits.
local DONE, PARKED = 0, 1

local tasks = weak() -- coroutine of a task -> what is known about it; must not refer to the coroutine
local waits = weak() -- coroutine -> true while it, or one that it has resumed, waits for an operation
local confined = weak() -- coroutine -> true while whoever resumed it cannot yield
local waiting = {} -- number of a task that waits -> its coroutine
local current -- the coroutine of the task that runs
local depth = 0 -- coroutines of the script that run one in the other
local last = PARKED -- the number that was given to a task last; they begin after the states

local function task_number()
  local task = tasks[current]
  if not task.number then
    last = last + 1
    task.number = last
  end
  return task.number
end

-- Whether whoever runs now can wait without holding up the daemon.
local function can_wait()
  return isyieldable() and not confined[running()]
end

-- Suspends the running task until continue() is called with its number and the results.
local function wait(operation)
  local number = task_number()
  waiting[number] = current
  local task = tasks[current]
  suspended(number, task.path, task.release, operation)
  return yield(OPERATION)
end

local function slice(co, ...)
  cpu_end = clock() + cpu_limit
  limited = true
  current = co
  depth = 0
  local _, marker = resume(co, ...)
  current = nil
  unlimit()
  if status(co) == "dead" then
    return DONE
  elseif marker ~= OPERATION then
    return PARKED
  end
  waits[co] = true
  return tasks[co].number
end

local function continue(number, ...)
  local co = waiting[number]
  waiting[number] = nil
  waits[co] = nil
  return slice(co, ...)
end

-- Gives up a task that waits: it will not be resumed any more.
local function abandon(number)
  local co = waiting[number]
  waiting[number] = nil
  local task = tasks[co]
  if task.close then
    task.close(task.object)
  end
end

-- Called in the task with what xpcall() returned; returns what a plain coroutine would.
local function ended(ok, ...)
  unlimit()
  local task = tasks[current]
  tasks[current] = nil -- at once: a table that waits for the collector grows large
  if task.close then
    task.close(task.object)
  end
  if not ok then
    failed(task.path, (...))
  end
  limited = true -- whoever resumed it, if that was not us
  if not ok then
    error((...), 0)
  end
  return ...
end

-- Returns a function that runs HANDLER as a task, up to its end or its first yield. What that
-- function takes, after the number of the release and the path for failed(), goes to NEW, which makes
-- HANDLER's argument; CLOSE is called with the argument when the handler has ended, however that came about.
local function starter(handler, new, close)
  return function(release, path, ...)
    local object = new and new(...)
    local co = create(function()
      return ended(xpcall(handler, locate, object))
    end)
    tasks[co] = { release = release, path = path, object = object, close = close }
    return slice(co)
  end
end

-- Coroutines of the script's own, which pass on the waits of those that they resume.

local enter

local function enter_again(co, ...)
  waits[co] = nil
  return enter(co, ...)
end

local function entered(co, outer, ...)
  current = outer
  depth = depth - 1
  local ok, marker = ...
  if ok and marker == OPERATION then
    waits[co] = true
    if tasks[co] then
      return true -- from now on it goes on by itself
    end
    return enter_again(co, yield(OPERATION))
  end
  return ...
end

enter = function(co, ...)
  if depth >= DEEPEST then
    return false, "too many coroutines resume each other"
  end
  depth = depth + 1
  local outer = current
  if tasks[co] then
    current = co
  else
    confined[co] = not can_wait() or nil
  end
  return entered(co, outer, resume(co, ...))
end

local function resume_again(co, ...)
  if type(co) ~= "thread" then
    error(format("bad argument #1 to 'resume' (coroutine expected, got %s)", type(co)), 2)
  elseif waits[co] then
    return false, WAITS
  end
  return enter(co, ...)
end
coroutine.resume = resume_again

local function unwrapped(ok, ...)
  if not ok then
    error((...), 2) -- that is whoever called what wrap() returned: tail calls leave no frame
  end
  return ...
end

coroutine.wrap = function(body)
  if type(body) ~= "function" then
    error(format("bad argument #1 to 'wrap' (function expected, got %s)", type(body)), 2)
  end
  local co = create(body)
  return function(...)
    return unwrapped(resume_again(co, ...))
  end
end

-- Where a function of the script begins.
local function defined(handler)
  return getinfo(handler, "S").linedefined
end

local function compile(code, name)
  return loadstring(code, "@" .. name)
end

local function global(name)
  local value = rawget(globals, name)
  return value, type(value)
end

-- Python must not be called while the interpreter is being closed, which runs the script's finalizers.
local closed = false

local function close()
  closed = true
end

-- Wraps a function of Python's that the script can get at.
local function guarded(call)
  return function(...)
    if closed then
      error("the daemon ends", 0)
    end
    return call(...)
  end
end

return {
  abandon = abandon,
  can_wait = can_wait,
  close = close,
  compile = compile,
  continue = continue,
  defined = defined,
  global = global,
  guarded = guarded,
  placed = placed,
  starter = starter,
  task_number = task_number,
  wait = wait,
}

-- Finds names in a script that do not exist, without running it.
--
-- Does not load without luacheck. Returns a function of CODE and API, which returns a list of findings
-- (line, kind, owner, name, and a table whose keys are the names there), or nil and why not. luacheck
-- finds unknown globals; methods and fields of our objects are found here, over its syntax tree. Only
-- what is certain is reported: everything that is ever assigned to a variable must be of one type.

-- Nothing may come from the current directory.
package.path = (";" .. package.path):gsub(";[^/;][^;]*", "")
package.cpath = ""

local luacheck = require("luacheck")
local decoder = require("luacheck.decoder")
local parser = require("luacheck.parser")
local clock, insert = os.clock, table.insert

local ASKING = { If = true, While = true, Paren = true, ["and"] = true, ["or"] = true, ["not"] = true }
local CONSTANT = { Nil = true, True = true, False = true }
local DYNAMIC = { -- whoever uses these may make or change global names in ways that cannot be seen
  _G = true, dofile = true, getfenv = true, getregistry = true, load = true, loaded = true,
  loadfile = true, loadstring = true, module = true, setfenv = true, setlocal = true,
  setupvalue = true, upvaluejoin = true,
}
local UNKNOWN = { tag = "Unknown" } -- an expression
local NOTHING = {} -- the type of nil

local Script = {} -- what is known of one script
Script.__index = Script

-- Variables: which one each name means, and the expressions that are assigned to it.

function Script:declare(names, name, value)
  names[name] = { values = { value }, type = NOTHING }
  insert(self.variables, names[name])
  return names[name]
end

function Script:lookup(scope, name)
  while scope do
    if scope.names[name] then
      return scope.names[name]
    end
    scope = scope.outer
  end
  local variable = self.globals[name] or self:declare(self.globals, name, self.api.modules[name])
  variable.global = name
  return variable
end

local function key_of(node)
  return node[2].tag == "String" and node[2][1]:match("^[%a_][%w_]*$") or nil
end

-- Whether NODE asks if there is what its child at position I names, as "if jit then" does.
local function asks(node, i)
  local operator, left = node[1], node[2]
  if node.tag ~= "Op" then
    return ASKING[node.tag] or node.tag == "Call" and operator[1] == "type"
  elseif operator == "or" and i == 3 then -- unpack or table.unpack
    return node.condition or left.variable and left.variable.global
  end
  return ASKING[operator] or (operator == "eq" or operator == "ne") and CONSTANT[node[3].tag]
end

-- Notes that what NODE names need not exist.
function Script:ask(node)
  if node.tag == "Index" then
    self.asked[key_of(node) or ""] = true
  elseif node.variable and not node.variable.asked then
    node.variable.asked, self.changed = true, true
  end
end

local visit = {} -- by tag

function Script:visit(node, scope)
  if visit[node.tag] then
    return visit[node.tag](self, node, scope)
  elseif not node.tag or node.tag == "Do" then
    scope = { outer = scope, names = {} }
  end
  for i, child in ipairs(node) do
    if type(child) == "table" then
      child.condition = child.tag == "Op" and (node.condition or ASKING[node.tag])
      self:visit(child, scope)
      if asks(node, i) then
        self:ask(child)
      end
      if node.tag == "Call" and child[1] == "require" then -- or pcall(require, NAME)
        self:note_module(node, node[i + 1])
      end
      self.dynamic = self.dynamic or child.requires and not node.tag -- for what the module does
    end
  end
end

function Script:note_module(call, argument)
  local name = argument and argument.tag == "String" and argument[1] or "_G"
  insert(self:lookup(nil, name:match("^[^.]*")).values, UNKNOWN) -- modules of the old kind define it
  self.dynamic = self.dynamic or DYNAMIC[name]
  call.requires = true
end

function visit:Id(node, scope, as_base)
  node.variable = self:lookup(scope, node[1])
  node.variable.escapes = node.variable.escapes or not as_base
  self.dynamic = self.dynamic or node.variable.global and DYNAMIC[node[1]]
end

function visit:Index(node, scope)
  local base, key = node[1], key_of(node)
  local global = base.tag == "Id" and self:lookup(scope, base[1]).global
  if global == "_G" and key and not DYNAMIC[key] then
    insert(self:lookup(nil, key).values, UNKNOWN)
  elseif base.tag == "Id" and key then
    visit.Id(self, base, scope, true)
    self.dynamic = self.dynamic or global and DYNAMIC[key] -- debug.setfenv
  else
    self:visit(base, scope)
  end
  for i = 2, #node do
    self:visit(node[i], scope)
  end
end
visit.Invoke = visit.Index

function visit:Repeat(node, scope)
  insert(node[1], { tag = "Op", "not", node[2] }) -- there it sees the variables of the block
  self:visit(node[1], scope)
end

function visit:Function(node, scope)
  local inner = { outer = scope, names = {} }
  for _, id in ipairs(node[1].tag and { node[1] } or node[1]) do
    if id.tag == "Id" then
      id.variable = self:declare(inner.names, id[1], UNKNOWN)
    end
  end
  for i = 2, #node do
    self:visit(node[i], i == #node and inner or scope)
  end
end
visit.Fornum, visit.Forin = visit.Function, visit.Function

function visit:Local(node, scope)
  local values = node[2] or {}
  for _, value in ipairs(values) do
    (value.tag == "Id" and visit.Id or self.visit)(self, value, scope, true)
  end
  for i, id in ipairs(node[1]) do
    self:declare(scope.names, id[1], values[i] or values[1] and UNKNOWN)
    local source = values[i] and values[i].variable
    if source and source.global then
      scope.names[id[1]] = source -- whatever happens to one may happen to the other
    end
  end
end
visit.Localrec = visit.Local

function visit:Set(node, scope)
  for _, value in ipairs(node[2]) do
    self:visit(value, scope)
  end
  for i, target in ipairs(node[1]) do
    if target.tag == "Id" then
      target.variable = self:lookup(scope, target[1])
      insert(target.variable.values, node[2][i] or UNKNOWN)
    else
      self:visit(target, scope)
      self.own_fields[key_of(target) or ""] = true
      if target[1].variable then
        target[1].variable.escapes = true -- it is not what it was
      end
    end
  end
end

-- Types: those of the API, NOTHING, or nil if unknown.

local function join(one, other)
  return one == NOTHING and other or (other == one or other == NOTHING) and one or nil
end

function Script:type_of(node)
  local callee = node.tag == "Call" and node[1].variable
  local name = callee and not callee.values[1] and not self.dynamic and callee.global
  if node.variable then
    return node.variable.type
  elseif CONSTANT[node.tag] or name == "error" then
    return NOTHING
  elseif name == "assert" and node[2] then
    return self:type_of(node[2])
  elseif callee then
    return self.api.functions[name] or nil
  elseif node.tag == "Call" then
    return self:type_of(node[1])
  elseif node.tag == "Index" or node.tag == "Invoke" then
    local owner, key = self:type_of(node[1]), key_of(node)
    return owner == NOTHING and owner or owner and key and self.api.classes[owner.members[key]]
  elseif node[1] == "or" then
    return join(self:type_of(node[2]), self:type_of(node[3]))
  end
  return node.members and node or nil -- a type is an expression, too
end

-- Follows values through variables: each type rises from NOTHING until it covers all values.
function Script:follow()
  -- Whoever gets a module or a table of counters as a value may add to it.
  for name, variable in pairs(self.globals) do
    if self.dynamic or variable.escapes and self.api.modules[name] then
      variable.type = nil
    end
  end
  repeat
    self.changed = false
    for _, variable in ipairs(self.variables) do
      for _, value in ipairs(variable.values) do
        local found = join(variable.type, self:type_of(value))
        found = (found ~= self.api.classes.own or not variable.escapes) and found or nil
        self.changed = self.changed or found ~= variable.type
        variable.type = found
        if variable.asked then
          self:ask(value)
        end
      end
    end
  until not self.changed
end

function Script:look(node)
  local key = (node.tag == "Index" or node.tag == "Invoke") and key_of(node)
  local owner = key and not self.own_fields[key] and self:type_of(node[1])
  if owner and owner ~= NOTHING and owner.members[key] == nil
    and (owner.kind == "field" or not self.asked[key]) then
    insert(self.findings, { node[2].line, owner.kind, owner.name, key, owner.members })
  end
  for _, child in ipairs(node) do
    if type(child) == "table" then
      self:look(child)
    end
  end
end

-- The daemon calls cgroup_released() with a cgroup; the script may call it with anything.
function Script:note_handler()
  local variable = self:lookup(nil, "cgroup_released")
  local handler = #variable.values == 1 and not variable.escapes and variable.values[1]
  local parameter = handler and handler.tag == "Function" and handler[1][1]
  if parameter and parameter.variable then
    parameter.variable.values[1] = self.api.classes.cgroup
  end
end

function Script:find_globals(script)
  local known = self.api.known
  for name, variable in pairs(self.globals) do
    known[name] = known[name] or variable.values[1] and true
  end
  local std = (self.globals.jit or self.globals._VERSION) and "max" or "luajit" -- those it asks for
  local options = { std = std, allow_defined = true }
  for _, warning in ipairs(luacheck.check_strings({ script }, options)[1]) do
    local code, line, name = warning.code, warning.line, warning.name
    local variable = self:lookup(nil, name or "")
    if (code == "112" or code == "113") and not known[name] and not variable.asked then
      insert(self.findings, { line, "global", "", name, known })
    elseif code == "143" and not variable.escapes and not variable.values[1] then
      local key, library = warning.field:match("^([%a_][%w_]*)%f[.%z]"), _G[name]
      local excused = not key or self.own_fields[key] or self.asked[key]
      if not excused and type(library) == "table" and library[key] == nil then
        insert(self.findings, { line, "function", name, key, library })
      end
    end
  end
end

local function analyse(code, api)
  local script = { api = api, variables = {}, globals = {}, own_fields = {}, asked = {}, findings = {} }
  local ast = parser.parse(decoder.decode(code))
  setmetatable(script, Script):visit(ast)
  script:note_handler()
  script:follow()
  if not script.dynamic then
    script:find_globals(code)
  end
  script:look(ast)
  return script.findings
end

return function(code, api)
  local deadline = clock() + 3 -- seconds
  jit.off() -- compiled code never calls the hook
  debug.sethook(function()
    if clock() > deadline then
      error("it takes too long", 0)
    end
  end, "", 10000)
  local ok, result = pcall(analyse, code, api)
  debug.sethook()
  return ok and result or nil, not ok and tostring(type(result) == "table" and result.msg or result)
end

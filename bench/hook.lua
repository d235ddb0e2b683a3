-- A small but real script, as a host that bills by account would have it.

local accounts = {}

function cgroup_released(cgroup)
  local name = cgroup.xattr.account or "none"
  local account = accounts[name]
  if not account then
    account = { releases = 0, cpu = 0, memory = 0 }
    accounts[name] = account
  end

  account.releases = account.releases + 1
  account.cpu = account.cpu + (cgroup.own.cpu_total or 0)
  local memory = cgroup.memory_peak
  if memory and memory > account.memory then
    account.memory = memory
  end
end

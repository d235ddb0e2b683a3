-- Says at once that a release is handled, but for one.

function cgroup_released(cgroup)
  local name = cgroup.path:match("[^/]+$")
  if name == "hangs" and cgroup.attempt == 1 then
    os.execute("sleep 1000")
  end
  print(name .. ":")
end

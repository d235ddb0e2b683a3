-- Says at once that a release is handled.

function cgroup_released(cgroup)
  print(cgroup.path:match("[^/]+$") .. ":")
end

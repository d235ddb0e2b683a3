function cgroup_released(cgroup)
end

"""Promises kept on the real kernel: root and a cgroup v2 hierarchy are needed."""

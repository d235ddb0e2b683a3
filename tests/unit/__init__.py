"""Unit tests: bytes in, values out; they need neither root nor a cgroup."""

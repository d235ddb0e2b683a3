"""The reaper at work on this machine's kernel: real cgroups, real processes, the real daemon."""

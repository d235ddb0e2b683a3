"""The reaper: watches cgroup v2 scopes, accounts for what ran empty, deletes it."""

"""The daemons at work on this machine's kernel: real cgroups, namespaces and processes."""

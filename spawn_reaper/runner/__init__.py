"""The process that the administrator's script runs in: LuaJIT, limits, and what a script can use.

Everything that a script can do wrong stays in here. The core, which has the capability to delete
others' cgroups, starts this process, tells it of releases over ``wire``, and replaces it when it
does not come back.
"""

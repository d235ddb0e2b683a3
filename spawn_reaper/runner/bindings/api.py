"""The names that scripts find, for those who look at scripts without running them."""

from __future__ import annotations

from spawn_reaper.runner.bindings import cgroup, control_client, pg, socket, sodium
from spawn_reaper.runner.bindings.calling import signatures_of
from spawn_reaper.runner.bindings.database import Connection
from spawn_reaper.runner.bindings.result import Result
from spawn_reaper.runner.lint import Api
from spawn_reaper.usage import Counters


def api() -> Api:
    """Return all functions, tables and classes."""

    def returns(owner: object) -> dict[str, str | None]:
        return {name: signature.returns for name, signature in signatures_of(owner).items()}

    return Api(
        functions={"control_resolve": "address"},
        modules={
            "socket": returns(socket.Sockets),
            "control_client": returns(control_client.ControlClients),
            "sodium": dict.fromkeys(sodium.FUNCTIONS),
            "pg": returns(pg.Pg),
        },
        classes={
            "address": {},
            "socket": returns(socket.Socket),
            "control_client": returns(control_client.ControlClient),
            "builder": returns(control_client.Builder),
            "connection": returns(Connection),
            "result": returns(Result),
            "cgroup": {},
        },
        fields={
            "cgroup": dict.fromkeys(cgroup.NAMES) | {"parent": "cgroup", "own": "own"},
            "own": dict.fromkeys(Counters.__struct_fields__),
        },
    )

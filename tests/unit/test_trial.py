"""Releases from files: every field, its unit, and what is refused."""

from __future__ import annotations

import json

import pytest

from spawn_reaper.runner.bindings.cgroup import NAMES
from spawn_reaper.trial import TrialError, read_trial


def test_an_empty_object_is_a_release_of_which_nothing_is_known() -> None:
    release = read_trial(b"{}").release
    assert release.path == b"/trial.scope/job"
    assert release.name == b"job"
    assert release.born is None
    assert release.usage.counters.cpu_total is None
    assert release.attributes == ({},)


def test_amounts_are_in_the_units_of_scripts() -> None:
    release = read_trial(b'{"cpu_total": 1.5, "memory_peak": 4096, "cpu_pressure": 0.25}').release
    assert release.usage.counters.cpu_total == 1_500_000
    assert release.usage.peaks.memory_peak == 4096
    assert release.pressures is not None
    assert release.pressures.cpu.some == 250_000


def test_own_is_all_that_was_used_unless_it_is_given() -> None:
    assert read_trial(b'{"cpu_total": 2}').release.own.cpu_total == 2_000_000
    assert (
        read_trial(b'{"cpu_total": 2, "own": {"cpu_total": 1}}').release.own.cpu_total == 1_000_000
    )


def test_attributes_have_the_names_that_scripts_use() -> None:
    release = read_trial(
        b'{"xattr": {"account": "a", "trusted.x": "b"}, "parent": {"xattr": {"account": "c"}}}'
    ).release
    assert release.attributes == (
        {b"user.account": b"a", b"trusted.x": b"b"},
        {b"user.account": b"c"},
    )


def test_every_field_that_scripts_can_read_can_be_given() -> None:
    tables: dict[str, object] = {"own": {}, "parent": {}, "xattr": {}}
    for name in NAMES:
        value = tables.get(name, {"path": "/x", "id": "1", "remainder": True}.get(name, 1))
        read_trial(json.dumps({name: value}).encode())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "truncated"),
        (b"[]", "Expected `object`"),
        (b"{", "truncated"),
        (b'{"cpu": 1}', "unknown field `cpu`"),
        (b'{"cpu_total": "1"}', "$.cpu_total"),
        (b'{"cpu_total": -1}', "$.cpu_total"),
        (b'{"cpu_total": 1e300}', "$.cpu_total"),
        (b'{"cpu_total": 9007199254740992}', "$.cpu_total"),
        (b'{"path": "job"}', "$.path"),
        (b'{"path": "/a\\u0000b"}', "$.path"),
        (b'{"xattr": {"a": 1}}', "$.xattr"),
        (b'{"own": {"path": "/x"}}', "unknown field `path`"),
        (b'{"path": "/\xff"}', "utf-8"),
        (b'{"parent":' * 5000 + b"{}" + b"}" * 5000, ""),
    ],
)
def test_what_is_no_release_is_refused_with_the_reason(text: bytes, reason: str) -> None:
    with pytest.raises(TrialError) as caught:
        read_trial(text)
    assert reason.lower() in str(caught.value).lower()
    assert "\n" not in str(caught.value)

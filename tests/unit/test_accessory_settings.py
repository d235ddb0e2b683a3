"""The accessory's settings: what can be set, and what is said about mistakes."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from spawn_accessory.settings import Allow, Limits, Settings, check, group_id, user_id
from spawn_common.settings import SettingsError, load

Load = Callable[[str], Settings]
Problems = Callable[[str], list[str]]


@pytest.fixture(name="load")
def load_text(tmp_path: Path) -> Load:
    """Return a function that loads settings from a text."""

    def load_settings(text: str) -> Settings:
        path = tmp_path / "accessory.toml"
        path.write_text(text)
        return load(path, Settings, check)

    return load_settings


@pytest.fixture
def problems(load: Load, tmp_path: Path) -> Problems:
    """Return a function that gives the problems of a text, as "LINE: KEY: REASON"."""

    def problems_of(text: str) -> list[str]:
        with pytest.raises(SettingsError) as error:
            load(text)
        return [one.removeprefix(f"{tmp_path}/accessory.toml:") for one in error.value.problems]

    return problems_of


def test_an_empty_file_means_the_defaults(load: Load) -> None:
    assert load("") == Settings()


def test_the_defaults_fit_a_large_host() -> None:
    """5,000 names with three namespaces each and 20,000 leases; names end after a minute."""
    assert Settings() == Settings(
        expiry=60.0,
        limits=Limits(connections=4096, names=10_000, namespaces=40_000),
        allow=(),
    )


def test_everything_can_be_set(load: Load) -> None:
    text = """
    expiry = 0.5
    [limits]
    connections = 1
    names = 2
    namespaces = 1_000_000
    [[allow]]
    users = ["root", 1]
    names = ["a*", "b"]
    [[allow]]
    groups = ["root", 2]
    """
    assert load(text) == Settings(
        expiry=0.5,
        limits=Limits(connections=1, names=2, namespaces=1_000_000),
        allow=(Allow(users=("root", 1), names=("a*", "b")), Allow(groups=("root", 2))),
    )


@pytest.mark.parametrize("value", ["0", "-1", "0.0", "86401", '"60"', "nan", "true", "[1]"])
def test_expiry_is_a_number_of_seconds_up_to_a_day(problems: Problems, value: str) -> None:
    (problem,) = problems(f"\nexpiry = {value}")
    assert problem.startswith("2: expiry: ")


@pytest.mark.parametrize("key", ["connections", "names", "namespaces"])
@pytest.mark.parametrize("value", ["0", "-1", "1_000_001", "1.5", '"1"', "true"])
def test_limits_are_numbers_above_zero(problems: Problems, key: str, value: str) -> None:
    (problem,) = problems(f"[limits]\n{key} = {value}")
    assert problem.startswith(f"2: limits.{key}: ")


def test_settings_that_do_not_exist_are_refused_where_they_are(problems: Problems) -> None:
    text = "colour = 1\n[limits]\nleases = 1\n"
    assert problems(text) == [
        "1: colour: unknown setting; known are allow, expiry, limits",
        "3: limits.leases: unknown setting; known are connections, names, namespaces",
    ]


@pytest.mark.parametrize("rule", ["user = [1]", "users = 1", "users = [1.5]", "names = [1]"])
def test_mistakes_in_a_rule_are_refused(problems: Problems, rule: str) -> None:
    (problem,) = problems(
        f"[[allow]]\nusers = [1]\n{rule}\n" if rule[0] == "n" else f"[[allow]]\n{rule}\n"
    )
    assert problem.startswith("1: allow: ")


@pytest.mark.parametrize("rule", ["", 'names = ["*"]', "users = []\ngroups = []"])
def test_a_rule_must_be_for_somebody(problems: Problems, rule: str) -> None:
    assert problems(f"[[allow]]\n{rule}") == ["1: allow: a rule needs users or groups"]


def test_each_user_and_group_that_does_not_exist_is_named(problems: Problems) -> None:
    text = '[[allow]]\nusers = ["nobody-here", "root"]\ngroups = ["x y", ""]'
    assert problems(text) == [
        "1: allow: there is no user 'nobody-here'",
        "1: allow: there is no group 'x y'",
        "1: allow: there is no group ''",
    ]


def test_a_user_that_cannot_exist_is_named_too(problems: Problems) -> None:
    text = '[[allow]]\nusers = ["a\\u0000b"]\ngroups = ["\\u0000"]'
    assert problems(text) == [
        "1: allow: there is no user 'a\\x00b'",
        "1: allow: there is no group '\\x00'",
    ]


def test_numbers_stand_for_themselves_and_names_for_those_of_the_host() -> None:
    assert (user_id(12345), group_id(12345)) == (12345, 12345)
    assert all(user_id(one.pw_name) == one.pw_uid for one in pwd.getpwall()[:5])
    assert all(group_id(one.gr_name) == one.gr_gid for one in grp.getgrall()[:5])

"""Which paths and glob patterns may name a managed scope."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spawn_reaper.scopes import check_pattern
from spawn_reaper.settings import DEFAULT_SCOPES


@pytest.mark.parametrize(
    "pattern",
    [
        *DEFAULT_SCOPES,
        "/a",
        "/a/b.scope",
        "/*/[ab]?.scope",
        "/a b/ü",
        "/..a/b../...",
        "/.hidden",
    ],
)
def test_a_path_below_the_root_can_be_managed(pattern: str) -> None:
    assert check_pattern(pattern) is None


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("", "begin with a slash"),
        ("a/b", "begin with a slash"),
        (" /a", "begin with a slash"),
        ("*", "begin with a slash"),
        ("/", "below the root"),
        ("/..", "'..'"),
        ("/a/../b", "'..'"),
        ("/a/..", "'..'"),
        ("/../", "'..'"),
        ("/./a", "'.'"),
        ("/a/.", "'.'"),
        ("//", "empty name"),
        ("//a", "empty name"),
        ("/a//b", "empty name"),
        ("/a/", "slash"),
        ("/a\0b", "NUL"),
    ],
)
def test_what_is_wrong_with_a_pattern_is_said(pattern: str, reason: str) -> None:
    assert reason in (check_pattern(pattern) or "")


PARTS = st.lists(st.sampled_from(["/", ".", "..", "a", "*", "\0", "ü"])).map("".join)


@given(st.text() | PARTS)
def test_exactly_the_paths_that_mean_one_place_are_accepted(pattern: str) -> None:
    plain = os.path.normpath(pattern) == pattern and "\0" not in pattern
    below_root = pattern.startswith("/") and not pattern.startswith("//") and pattern != "/"
    assert (check_pattern(pattern) is None) == (plain and below_root)

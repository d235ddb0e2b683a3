"""Settings from TOML: typed, complete, and every problem on a line that says where and why."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spawn_common.settings import SettingsError, load
from spawn_reaper.settings import DEFAULT_SCOPES, Handlers, Settings, check

Load = Callable[[str | bytes], Settings]
Problems = Callable[[str | bytes], list[str]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings") / "reaper.toml"


@pytest.fixture(scope="module", name="load")
def load_text(path: Path) -> Load:
    """Return a function that loads settings from a text."""

    def load_settings(text: str | bytes) -> Settings:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load(path, Settings, check)

    return load_settings


@pytest.fixture(scope="module")
def problems(load: Load, path: Path) -> Problems:
    """Return a function that gives the problems of a text, each without its "PATH:"."""

    def problems_of(text: str | bytes) -> list[str]:
        try:
            load(text)
        except SettingsError as error:
            found = error.problems
        else:
            return []
        assert found
        assert all(re.match(rf"{re.escape(str(path))}:[1-9]\d*: \S", problem) for problem in found)
        return [problem.removeprefix(f"{path}:") for problem in found]

    return problems_of


# What can be set


def test_an_empty_file_means_the_defaults(load: Load) -> None:
    assert load("") == load("# nothing\n") == Settings()


def test_the_defaults_are_those_of_the_documentation() -> None:
    assert Settings() == Settings(
        scopes=(
            "/system.slice/system-cm4all.slice/bp-spawn.scope",
            "/system.slice/system-cm4all.slice/lukko-spawn.scope",
            "/system.slice/system-cm4all.slice/workshop-spawn.scope",
        ),
        grace=0.05,
        unclaimed=60.0,
        log=True,
    )


def test_the_defaults_pass_their_own_check() -> None:
    assert list(check(Settings(scopes=DEFAULT_SCOPES))) == []


def test_every_setting_can_be_set(load: Load) -> None:
    text = """
        scopes = ["/a.scope", "/b/*.scope"]
        grace = 0.1
        unclaimed = 30
        log = false
        pressure = true
        stop = 5.5
        reload = "script"

        [handlers]
        running = 8
        queue = 500
        time = 2.5
        cpu = 1
        memory = 64
        hang = 30
    """
    assert load(text) == Settings(
        scopes=("/a.scope", "/b/*.scope"),
        grace=0.1,
        unclaimed=30.0,
        log=False,
        pressure=True,
        stop=5.5,
        reload="script",
        handlers=Handlers(running=8, queue=500, time=2.5, cpu=1.0, hang=30.0, memory=64.0),
    )


def test_every_setting_is_covered_above() -> None:
    assert Settings.__struct_fields__ == (
        "scopes",
        "grace",
        "unclaimed",
        "log",
        "pressure",
        "stop",
        "reload",
        "handlers",
    )
    assert Handlers.__struct_fields__ == ("running", "queue", "time", "cpu", "hang", "memory")


@pytest.mark.parametrize(
    "text",
    [
        "[handlers]\nrunning = 8",
        "handlers.running = 8",
        "handlers = { running = 8 }",
        '["handlers"]\n"running" = 8',
        "handlers . running = 8",
    ],
)
def test_a_nested_setting_can_be_written_in_every_way_of_toml(load: Load, text: str) -> None:
    assert load(text) == Settings(handlers=Handlers(running=8))


@pytest.mark.parametrize(
    "text",
    [
        "grace = 0",
        "grace = 86400",
        "unclaimed = 0.001",
        "unclaimed = 86400.0",
        "stop = 0",
        "handlers.running = 1",
        "handlers.running = 1_000_000",
        "handlers.time = 0.001",
        "handlers.memory = 1",
        "handlers.queue = 1",
    ],
)
def test_the_limits_of_a_range_belong_to_it(load: Load, text: str) -> None:
    load(text)


# What is refused


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("grace = -0.1", "grace", ">= 0"),
        ("grace = 86400.1", "grace", "<= 86400"),
        ("grace = nan", "grace", ">= 0"),
        ("grace = inf", "grace", "<= 86400"),
        ("grace = 1e400", "grace", "<= 86400"),
        (f"grace = {'9' * 400}", "grace", "out of range"),
        ("unclaimed = 0", "unclaimed", "> 0"),
        ("unclaimed = nan", "unclaimed", "> 0"),
        ("stop = -1", "stop", ">= 0"),
        ("stop = -inf", "stop", ">= 0"),
        ("scopes = []", "scopes", "length >= 1"),
        ("handlers.running = 0", "handlers.running", ">= 1"),
        ("handlers.running = 1_000_001", "handlers.running", "<= 1000000"),
        (f"handlers.running = {'9' * 30}", "handlers.running", "<= 1000000"),
        ("handlers.queue = 0", "handlers.queue", ">= 1"),
        ("handlers.time = 0.0", "handlers.time", "> 0"),
        ("handlers.cpu = nan", "handlers.cpu", "> 0"),
        ("handlers.memory = 0.9", "handlers.memory", ">= 1"),
    ],
)
def test_a_value_out_of_range_is_refused(
    problems: Problems, text: str, key: str, reason: str
) -> None:
    (problem,) = problems(text)
    assert problem.startswith(f"1: {key}: ")
    assert reason in problem


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ('grace = "1"', "grace", "got `str`"),
        ("grace = true", "grace", "got `bool`"),
        ("grace = 2026-01-01", "grace", "got `date`"),
        ("log = 1", "log", "got `int`"),
        ('pressure = "yes"', "pressure", "got `str`"),
        ('scopes = "/a"', "scopes", "got `str`"),
        ('scopes = ["/a", 3]', "scopes", "got `int` at `scopes[1]`"),
        ("handlers.running = 1.5", "handlers.running", "got `float`"),
        ("handlers.running = true", "handlers.running", "got `bool`"),
        ("grace = [1]", "grace", "got `array`"),
        ("grace = {}", "grace", "got `object`"),
        ("[grace]\nx = 1", "grace", "got `object`"),
        ("handlers = 3", "handlers", "must be a table"),
        ("handlers = []", "handlers", "must be a table"),
        ("handlers.time = {}", "handlers.time", "got `object`"),
    ],
)
def test_a_value_of_a_wrong_type_is_refused(
    problems: Problems, text: str, key: str, reason: str
) -> None:
    (problem,) = problems(text)
    assert problem.startswith(f"1: {key}: ")
    assert reason in problem


@pytest.mark.parametrize(
    ("text", "key", "suggestion"),
    [
        ("grce = 1", "grce", "grace"),
        ("Grace = 1", "Grace", "grace"),
        ("running = 1", "running", "handlers"),
        ("handlers.runing = 1", "handlers.runing", "running"),
        ("handlers = { grace = 1 }", "handlers.grace", "time"),
        ("[log_lines]\nx = 1", "log_lines", "log"),
    ],
)
def test_an_unknown_key_is_refused_and_the_known_ones_named(
    problems: Problems, text: str, key: str, suggestion: str
) -> None:
    (problem,) = problems(text)
    place, _, known = problem.partition("unknown setting; known are ")
    assert place == f"1: {key}: "
    assert suggestion in known.split(", ")


@pytest.mark.parametrize(
    ("scope", "reason"),
    [
        ("a.scope", "must begin with a slash"),
        ("/a/../b", "must not contain '.' or '..'"),
        ("/", "must name a cgroup below the root"),
        ("", "must begin with a slash"),
        (r"/a\u0000", "must not contain a NUL byte"),
    ],
)
def test_a_scope_that_cannot_be_managed_is_refused(
    problems: Problems, scope: str, reason: str
) -> None:
    (problem,) = problems(f'scopes = ["/good", "{scope}"]')
    assert problem.startswith("1: scopes: '")
    assert problem.endswith(reason)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("grace 1", 1),
        ("log = true\n= 3\n", 2),
        ("\n\ngrace = 1\ngrace = 2\n", 4),
        ("[handlers]\n[handlers]\n", 2),
        ("log = true\r\nlog = maybe\r\n", 2),
        ("# fine\nscopes = ['/a'\n", 3),
        ("grace = 1 # \0\n", 1),
        ("\ufeffgrace = 1", 1),
        ("\nwhen = 2026-13-45", 2),
    ],
)
def test_a_syntax_error_names_its_line(problems: Problems, text: str, line: int) -> None:
    (problem,) = problems(text)
    assert problem.startswith(f"{line}: ")
    assert not problem.endswith(")")  # the line is said once


def test_a_text_that_is_not_utf8_names_its_line(problems: Problems) -> None:
    assert problems(b"log = true\n# caf\xe9\n") == ["2: not UTF-8"]


# Where the problem is


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\n# grace = 1\ngrace = -1\n", 3),
        ("log = true\r\n\r\ngrace = -1\r\n", 3),
        ("\n  grace=-1", 2),
        ("\n'grace' = -1", 2),
        ('\n"grace" = -1', 2),
        ("\n[handlers]\ntime = 1\ncpu = 0\n", 4),
        ("\n[ handlers ] # limits\n\ncpu = 0\n", 4),
        ("\nhandlers.time = 1\nhandlers.cpu = 0\n", 3),
        ("\n\nhandlers = { time = 1, cpu = 0 }\n", 3),
        ("\n[unknown]\nkey = 1\n", 2),
        ("\nscopes = [\n  '/a',\n  'b',\n]\n", 2),
        ("cpu = 1\n[handlers]\ncpu = 1\n", 1),
        ("[handlers]\ncpu = 1\ngrace = 1\n", 3),
    ],
)
def test_a_problem_names_its_line(problems: Problems, text: str, line: int) -> None:
    (problem,) = problems(text)
    assert problem.startswith(f"{line}: ")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        pytest.param("\nunknown.key = 1\n", 2, id="dotted below an unknown key"),
        pytest.param("\n[unknown.table]\nkey = 1\n", 2, id="table below an unknown key"),
        pytest.param("\ngrace.key = 1\n", 2, id="dotted below a value"),
        pytest.param("\nhandlers . cpu = 0\n", 2, id="spaces around the dot"),
        pytest.param("\n[[handlers]]\ncpu = 1\n", 2, id="array of tables"),
        pytest.param('\n"a.b" = 1\n', 2, id="dot in a quoted key"),
        pytest.param('\n"a b" = 1\n', 2, id="space in a quoted key"),
        pytest.param("# \u2028\ngrace = -1\n", 2, id="line separator in a comment"),
        pytest.param("scopes = ['''/a\ngrace = 1''']\ngrace = -1\n", 3, id="long string"),
    ],
)
def test_a_problem_names_its_line_however_the_key_is_written(
    problems: Problems, text: str, line: int
) -> None:
    (problem,) = problems(text)
    assert problem.startswith(f"{line}: ")


def test_all_problems_are_reported_at_once(problems: Problems) -> None:
    text = "grace = -1\nlogs = true\nlog = 0\n\n[handlers]\nrunning = 0\ntimes = 1\ncpu = 'x'\n"
    found = problems(text)
    assert [problem.rpartition(": ")[0] for problem in found] == [
        "1: grace",
        "2: logs",
        "3: log",
        "6: handlers.running",
        "7: handlers.times",
        "8: handlers.cpu",
    ]


def test_all_bad_scopes_are_reported_at_once(problems: Problems) -> None:
    assert problems("\nscopes = ['a', '/b', '/c/..']") == [
        "2: scopes: 'a' must begin with a slash",
        "2: scopes: '/c/..' must not contain '.' or '..'",
    ]


def test_a_file_that_cannot_be_read_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.toml", Settings, check)
    with pytest.raises(IsADirectoryError):
        load(tmp_path, Settings, check)


# Any text at all

TOKENS: Final = st.sampled_from(
    [*"[]{}=.,\"'#\n\t ", "grace", "handlers", "time", "x", "1", "-1.5", "nan", "2026-01-01"]
)
STATEMENTS: Final = st.builds(
    "{} = {}\n".format,
    st.sampled_from(["grace", "scopes", "handlers", "handlers.time", "log", "unknown", "'x'.y"]),
    st.sampled_from(["1", "-1", "nan", "true", "'/a'", "['/a', 'b']", "[]", "{}", "{time = 0}"]),
)


@given(st.text() | st.lists(TOKENS).map("".join) | st.lists(STATEMENTS).map("".join))
def test_any_text_is_settings_or_lines_that_say_why_not(problems: Problems, text: str) -> None:
    for problem in problems(text):
        assert problem.isprintable()
        assert int(problem.partition(":")[0]) <= text.count("\n") + 1


@given(st.binary())
def test_any_bytes_are_settings_or_lines_that_say_why_not(problems: Problems, data: bytes) -> None:
    assert all(problem.isprintable() for problem in problems(data))


def test_an_endless_number_is_a_problem_on_its_line(problems: Problems) -> None:
    (problem,) = problems(f"log = true\ngrace = {'9' * 5000}\n")
    assert problem.startswith("2: ")


def test_brackets_without_end_are_a_problem(problems: Problems) -> None:
    assert len(problems(f"grace = {'[' * 5000}\n")) == 1


def test_a_key_cannot_forge_a_line(problems: Problems) -> None:
    (problem,) = problems(r'"a\n/etc/passwd:1: b" = 1')
    assert "\n" not in problem

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gpumesh.config import forms
from gpumesh.config.forms import SensitiveError
from gpumesh.topology import Target

GOOD: list[tuple[Callable[[str], Any], str, Any]] = [
    (forms.parse_name, "iceland-2.gpu_a", "iceland-2.gpu_a"),
    (forms.parse_line, "any text", "any text"),
    (forms.parse_integer, " 42 ", 42),
    (forms.parse_weight, ".5", 0.5),
    (forms.parse_weight, "1000", 1000.0),
    (forms.parse_duration, "500ms", 0.5),
    (forms.parse_duration, " 1.5 s ", 1.5),
    (forms.parse_duration, "2m", 120.0),
    (forms.parse_duration, "1h", 3600.0),
    (forms.parse_host, "209.170.80.132", "209.170.80.132"),
    (forms.parse_host, "[2001:db8::1]", "2001:db8::1"),
    (forms.parse_host, "fe80::1%eth0", "fe80::1%eth0"),
    (forms.parse_host, "my_box.lan", "my_box.lan"),
    (forms.parse_user, "me@corp", "me@corp"),
    (forms.parse_jump, "me@bastion:2222", "me@bastion:2222"),
    (forms.parse_jump, "[::1]:22", "[::1]:22"),
    (forms.parse_alias, "work", "work"),
    (forms.parse_variable_name, "POD_PASSWORD", "POD_PASSWORD"),
    (forms.parse_path, "~/.ssh/id", "~/.ssh/id"),
    (forms.parse_command, "vastai show 'a b'", ("vastai", "show", "a b")),
    (forms.parse_url, "http://h", Target("h", 80)),
    (forms.parse_url, "https://h:8443/x/v1/", Target("h", 8443, "https", "/x")),
    (forms.parse_url, "http://[::1]:11434", Target("::1", 11434)),
    (forms.parse_redis_url, "redis://localhost:6379/0", "redis://localhost:6379/0"),
    (forms.parse_redis_url, "unix:///run/redis.sock", "unix:///run/redis.sock"),
    (forms.parse_origin, "*", "*"),
    (forms.parse_origin, "https://app.example.com", "https://app.example.com"),
]

BAD: list[tuple[Callable[[str], Any], str, str]] = [
    (forms.parse_name, "-a", "is not a name"),
    (forms.parse_name, "a" * 64, "is not a name"),
    (forms.parse_line, "a\nb", "must be one line"),
    (forms.parse_line, " ", "must be one line"),
    (forms.parse_integer, "1e5", "is not a whole number"),
    (forms.parse_integer, "9" * 19, "is not a whole number"),
    (forms.parse_weight, "0", "enabled: false"),
    (forms.parse_weight, "nan", "is not a number"),
    (forms.parse_duration, "5", "has no unit: write 5s"),
    (forms.parse_duration, "5 days", "is not a duration"),
    (forms.parse_host, "h:22", "write `port: 22` apart"),
    (forms.parse_host, "root@h", "write `user:` apart"),
    (forms.parse_host, "::g", "neither a host name nor an address"),
    (forms.parse_host, "fe80::1%a b", "has a zone"),
    (forms.parse_host, "-oProxyCommand=x", "neither a host name nor an address"),
    (forms.parse_host, "", "neither a host name nor an address"),
    (forms.parse_user, "-l", "is not a user's name"),
    (forms.parse_jump, "a@b@c:99999", "has a port"),
    (forms.parse_jump, "a:b:c", r"is not \[user@\]host"),
    (forms.parse_alias, "-F/x", "is not the name of a Host"),
    (forms.parse_variable_name, "hunter2!", "must be the name of an environment variable"),
    (forms.parse_path, "~other/x", "another user's home"),
    (forms.parse_path, "", "is not a path"),
    (forms.parse_command, "'x", "a quote that is not closed"),
    (forms.parse_command, " ", "names no program"),
    (forms.parse_url, "h:1", "is not a URL"),
    (forms.parse_url, "ftp://h", "is not a URL"),
    (forms.parse_url, "http://h:99999", "the port or the address in it cannot be read"),
    (forms.parse_url, "http://h:0", "has port 0"),
    (forms.parse_url, "http://me:pw@h", "holds a user or password"),
    (forms.parse_url, "http://h/?a=b", "has a query"),
    (forms.parse_url, "http://h/ü", "percent-encoded"),
    (forms.parse_redis_url, "http://h", "is not Redis's URL"),
    (forms.parse_redis_url, "redis://:pw@h", "holds a password"),
    (forms.parse_redis_url, "unix://h", "is not Redis's URL"),
    (forms.parse_origin, "https://app.example.com/path", "is not an origin"),
]


@pytest.mark.parametrize(("form", "text", "value"), GOOD)
def test_what_is_right(form: Callable[[str], Any], text: str, value: Any) -> None:
    assert form(text) == value


@pytest.mark.parametrize(("form", "text", "said"), BAD)
def test_what_is_wrong_completes_a_sentence(form: Callable[[str], Any], text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        form(text)
    assert "hunter2" not in str(caught.value)


def test_what_may_be_a_secret_says_so() -> None:
    for form, text in (
        (forms.parse_variable_name, "hunter2!"),
        (forms.parse_url, "http://a:b@h"),
        (forms.parse_redis_url, "redis://:pw@h"),
    ):
        with pytest.raises(SensitiveError):
            form(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "500ms"), (5.0, "5s"), (120.0, "2m"), (90.0, "90s"), (3600.0, "1h"), (1.5, "1.5s"), (1e-6, "0.001000ms")],
)
def test_durations_as_a_person_writes_them(seconds: float, text: str) -> None:
    assert forms.format_duration(seconds) == text
    assert forms.parse_duration(text) == pytest.approx(seconds)


def test_limits() -> None:
    assert forms.check_range(5, 1, 10, str) == 5
    with pytest.raises(ValueError, match="is not between 1 and 10"):
        forms.check_range(11, 1, 10, str)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gpumesh.config import forms
from gpumesh.config.forms import SensitiveError
from gpumesh.topology import Target

GOOD: list[tuple[Callable[[str], Any], str, Any]] = [
    (forms.name, "iceland-2.gpu_a", "iceland-2.gpu_a"),
    (forms.line, "any text", "any text"),
    (forms.whole, " 42 ", 42),
    (forms.weight, ".5", 0.5),
    (forms.weight, "1000", 1000.0),
    (forms.duration, "500ms", 0.5),
    (forms.duration, " 1.5 s ", 1.5),
    (forms.duration, "2m", 120.0),
    (forms.duration, "1h", 3600.0),
    (forms.host, "209.170.80.132", "209.170.80.132"),
    (forms.host, "[2001:db8::1]", "2001:db8::1"),
    (forms.host, "fe80::1%eth0", "fe80::1%eth0"),
    (forms.host, "my_box.lan", "my_box.lan"),
    (forms.user, "me@corp", "me@corp"),
    (forms.jump, "me@bastion:2222", "me@bastion:2222"),
    (forms.jump, "[::1]:22", "[::1]:22"),
    (forms.alias, "work", "work"),
    (forms.variable, "POD_PASSWORD", "POD_PASSWORD"),
    (forms.path, "~/.ssh/id", "~/.ssh/id"),
    (forms.command, "vastai show 'a b'", ("vastai", "show", "a b")),
    (forms.url, "http://h", Target("h", 80)),
    (forms.url, "https://h:8443/x/v1/", Target("h", 8443, "https", "/x")),
    (forms.url, "http://[::1]:11434", Target("::1", 11434)),
    (forms.redis_url, "redis://localhost:6379/0", "redis://localhost:6379/0"),
    (forms.redis_url, "unix:///run/redis.sock", "unix:///run/redis.sock"),
    (forms.origin, "*", "*"),
    (forms.origin, "https://app.example.com", "https://app.example.com"),
]

BAD: list[tuple[Callable[[str], Any], str, str]] = [
    (forms.name, "-a", "is not a name"),
    (forms.name, "a" * 64, "is not a name"),
    (forms.line, "a\nb", "must be one line"),
    (forms.line, " ", "must be one line"),
    (forms.whole, "1e5", "is not a whole number"),
    (forms.whole, "9" * 19, "is not a whole number"),
    (forms.weight, "0", "enabled: false"),
    (forms.weight, "nan", "is not a number"),
    (forms.duration, "5", "has no unit: write 5s"),
    (forms.duration, "5 days", "is not a duration"),
    (forms.host, "h:22", "write `port: 22` apart"),
    (forms.host, "root@h", "write `user:` apart"),
    (forms.host, "::g", "neither a host name nor an address"),
    (forms.host, "fe80::1%a b", "has a zone"),
    (forms.host, "-oProxyCommand=x", "neither a host name nor an address"),
    (forms.host, "", "neither a host name nor an address"),
    (forms.user, "-l", "is not a user's name"),
    (forms.jump, "a@b@c:99999", "has a port"),
    (forms.jump, "a:b:c", r"is not \[user@\]host"),
    (forms.alias, "-F/x", "is not the name of a Host"),
    (forms.variable, "hunter2!", "must be the name of an environment variable"),
    (forms.path, "~other/x", "another user's home"),
    (forms.path, "", "is not a path"),
    (forms.command, "'x", "a quote that is not closed"),
    (forms.command, " ", "names no program"),
    (forms.url, "h:1", "is not a URL"),
    (forms.url, "ftp://h", "is not a URL"),
    (forms.url, "http://h:99999", "the port or the address in it cannot be read"),
    (forms.url, "http://h:0", "has port 0"),
    (forms.url, "http://me:pw@h", "holds a user or password"),
    (forms.url, "http://h/?a=b", "has a query"),
    (forms.url, "http://h/ü", "percent-encoded"),
    (forms.redis_url, "http://h", "is not Redis's URL"),
    (forms.redis_url, "redis://:pw@h", "holds a password"),
    (forms.redis_url, "unix://h", "is not Redis's URL"),
    (forms.origin, "https://app.example.com/path", "is not an origin"),
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
    for form, text in ((forms.variable, "hunter2!"), (forms.url, "http://a:b@h"), (forms.redis_url, "redis://:pw@h")):
        with pytest.raises(SensitiveError):
            form(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "500ms"), (5.0, "5s"), (120.0, "2m"), (90.0, "90s"), (3600.0, "1h"), (1.5, "1.5s"), (1e-6, "0.001000ms")],
)
def test_durations_as_a_person_writes_them(seconds: float, text: str) -> None:
    assert forms.format_duration(seconds) == text
    assert forms.duration(text) == pytest.approx(seconds)


def test_limits() -> None:
    assert forms.limited(5, 1, 10, str) == 5
    with pytest.raises(ValueError, match="is not between 1 and 10"):
        forms.limited(11, 1, 10, str)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gpumesh.config import value_parsers
from gpumesh.config.redis_url import parse_redis_url
from gpumesh.config.value_parsers import SensitiveError
from gpumesh.topology import Target

GOOD: list[tuple[Callable[[str], Any], str, Any]] = [
    (value_parsers.parse_name, "iceland-2.gpu_a", "iceland-2.gpu_a"),
    (value_parsers.parse_line, "any text", "any text"),
    (value_parsers.parse_integer, " 42 ", 42),
    (value_parsers.parse_weight, ".5", 0.5),
    (value_parsers.parse_weight, "1000", 1000.0),
    (value_parsers.parse_hourly_price, "0.34", 0.34),
    (value_parsers.parse_hourly_price, "0", 0.0),
    (value_parsers.parse_duration, "500ms", 0.5),
    (value_parsers.parse_duration, " 1.5 s ", 1.5),
    (value_parsers.parse_duration, "2m", 120.0),
    (value_parsers.parse_duration, "1h", 3600.0),
    (value_parsers.parse_host, "209.170.80.132", "209.170.80.132"),
    (value_parsers.parse_host, "[2001:db8::1]", "2001:db8::1"),
    (value_parsers.parse_host, "fe80::1%eth0", "fe80::1%eth0"),
    (value_parsers.parse_host, "my_box.lan", "my_box.lan"),
    (value_parsers.parse_user, "me@corp", "me@corp"),
    (value_parsers.parse_jump, "me@bastion:2222", "me@bastion:2222"),
    (value_parsers.parse_jump, "[::1]:22", "[::1]:22"),
    (value_parsers.parse_alias, "work", "work"),
    (value_parsers.parse_variable_name, "POD_PASSWORD", "POD_PASSWORD"),
    (value_parsers.parse_path, "~/.ssh/id", "~/.ssh/id"),
    (value_parsers.parse_command, "vastai show 'a b'", ("vastai", "show", "a b")),
    (value_parsers.parse_url, "http://h", Target("h", 80)),
    (value_parsers.parse_url, "https://h:8443/x/v1/", Target("h", 8443, "https", "/x")),
    (value_parsers.parse_url, "http://[::1]:11434", Target("::1", 11434)),
    (parse_redis_url, "redis://localhost:6379/0", "redis://localhost:6379/0"),
    *(
        (parse_redis_url, url, url)
        for url in (
            "unix:///run/redis.sock",
            "unix:///run/redis.sock?db=1",
            "unix://gateway@/run/redis.sock",
            "rediss://gateway@redis.example.com",
            "redis://[::1]:6379/",
            "redis+sentinel://one:26379,two,[::1]:26379/mesh/2",
            "rediss+sentinel://gateway@one/mesh",
        )
    ),
    (value_parsers.parse_origin, "*", "*"),
    (value_parsers.parse_origin, "https://app.example.com", "https://app.example.com"),
]

BAD: list[tuple[Callable[[str], Any], str, str]] = [
    (value_parsers.parse_name, "-a", "is not a name"),
    (value_parsers.parse_name, "a" * 64, "is not a name"),
    (value_parsers.parse_line, "a\nb", "must be one line"),
    (value_parsers.parse_line, " ", "must be one line"),
    (value_parsers.parse_integer, "1e5", "is not a whole number"),
    (value_parsers.parse_integer, "9" * 19, "is not a whole number"),
    (value_parsers.parse_weight, "0", "enabled: false"),
    (value_parsers.parse_weight, "nan", "is not a number"),
    (value_parsers.parse_duration, "5", "has no unit: write 5s"),
    (value_parsers.parse_duration, "5 days", "is not a duration"),
    (value_parsers.parse_host, "h:22", "write `port: 22` apart"),
    (value_parsers.parse_host, "root@h", "write `user:` apart"),
    (value_parsers.parse_host, "::g", "neither a host name nor an address"),
    (value_parsers.parse_host, "fe80::1%a b", "has a zone"),
    (value_parsers.parse_host, "-oProxyCommand=x", "neither a host name nor an address"),
    (value_parsers.parse_host, "", "neither a host name nor an address"),
    (value_parsers.parse_user, "-l", "is not a user's name"),
    (value_parsers.parse_jump, "a@b@c:99999", "has a port"),
    (value_parsers.parse_jump, "a:b:c", r"is not \[user@\]host"),
    (value_parsers.parse_alias, "-F/x", "is not the name of a Host"),
    (value_parsers.parse_variable_name, "hunter2!", "must be the name of an environment variable"),
    (value_parsers.parse_path, "~other/x", "another user's home"),
    (value_parsers.parse_path, "", "is not a path"),
    (value_parsers.parse_command, "'x", "a quote that is not closed"),
    (value_parsers.parse_command, " ", "names no program"),
    (value_parsers.parse_url, "h:1", "is not a URL"),
    (value_parsers.parse_url, "ftp://h", "is not a URL"),
    (value_parsers.parse_url, "http://h:99999", "the port or the address in it cannot be read"),
    (value_parsers.parse_url, "http://h:0", "has port 0"),
    (value_parsers.parse_url, "http://me:pw@h", "holds a user or password"),
    (value_parsers.parse_url, "http://h/?a=b", "has a query"),
    (value_parsers.parse_url, "http://h/ü", "percent-encoded"),
    (parse_redis_url, "http://h", "is not Redis's URL"),
    (parse_redis_url, "redis://:pw@h", "holds a password"),
    *(
        (parse_redis_url, url, "is not Redis's URL")
        for url in (
            "unix://h",
            "unix:///",
            "redis://",
            "redis://h:99999",
            "redis://h:0",
            "redis://h/first",
            "redis://h#x",
            "redis:h",
            "redis://h\n",
            "redis+sentinel://one:26379",
            "redis+sentinel://one:99999/mesh",
            "redis+sentinel:///mesh",
            "redis+sentinel://one,,two/mesh",
        )
    ),
    (parse_redis_url, "redis://h/0?password=hunter2", "question mark"),
    (parse_redis_url, "redis+sentinel://a:hunter2@one/mesh", "holds a password"),
    (value_parsers.parse_origin, "https://app.example.com/path", "is not an origin"),
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
        (value_parsers.parse_variable_name, "hunter2!"),
        (value_parsers.parse_url, "http://a:b@h"),
        (parse_redis_url, "redis://:pw@h"),
        (parse_redis_url, "rediss+sentinel://:pw@h,i/mesh"),
        (parse_redis_url, "redis://h?password=pw"),
    ):
        with pytest.raises(SensitiveError):
            form(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "500ms"), (5.0, "5s"), (120.0, "2m"), (90.0, "90s"), (3600.0, "1h"), (1.5, "1.5s"), (1e-6, "0.001000ms")],
)
def test_durations_as_a_person_writes_them(seconds: float, text: str) -> None:
    assert value_parsers.format_duration(seconds) == text
    assert value_parsers.parse_duration(text) == pytest.approx(seconds)


def test_limits() -> None:
    assert value_parsers.check_range(5, 1, 10, str) == 5
    with pytest.raises(ValueError, match="is not between 1 and 10"):
        value_parsers.check_range(11, 1, 10, str)

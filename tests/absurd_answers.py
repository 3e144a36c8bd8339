"""Absurd answers of a host or its server, as strategies for hypothesis: JSON with values of wrong types and without
bounds, and tables of nvidia-smi."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st


@dataclass(frozen=True)
class Raw:
    """JSON text that Python would not write."""

    text: str

    def __repr__(self) -> str:
        return f"Raw({self.text[:20]!r} of {len(self.text)})"


def json_text(value: Any) -> str:
    """Like json.dumps, with ``Raw`` and ``NaN``; half of a surrogate pair becomes an escape."""
    match value:
        case Raw():
            return value.text
        case dict():
            return "{" + ",".join(f"{json.dumps(key)}:{json_text(part)}" for key, part in value.items()) + "}"
        case list() | tuple():
            return "[" + ",".join(map(json_text, value)) + "]"
    return json.dumps(value)


def json_bytes(value: Any) -> bytes:
    return json_text(value).encode()


DEEP = Raw("[" * 500 + "]" * 500)
DEEPER = Raw("[" * 100_000 + "]" * 100_000)

TEXTS = st.sampled_from(
    [
        "",
        " ",
        "²",
        "0.²",
        "٣.٤",  # digits to str.isdigit(), and to int()
        "½",
        "0." + "9" * 5000,
        "1.2.3.4.5.6.7.8.9",
        "-1",
        "NaN",
        "yesterday",
        "0000-01-01T00:00:00Z",
        "99999-01-01T00:00:00Z",
        "9999-12-31T23:59:59.999999999-23:59",
        "2026-02-30T00:00:00Z",
        "2026-W01-1",
        "20260101",
        "2026-01-01T00:00:00+99:99",
        "2" * 100_000,
        "x" * 1_000_000,
        "a\x00b",
        "\ud800",
        "\udfff\ud800",
        "\u202egnp.exe",
        "\x1b]0;owned\x07\x1b[2J",
        "a\r\nb: c",
        'quote " and \\ back',
        "{}",
        "[bold red]markup[/]",
        "%s%n${HOME}`id`$(id)",
        "../../etc/passwd",
        "é日本語🎉",
    ]
)
NUMBERS = st.sampled_from(
    [
        0,
        -1,
        1,
        True,
        0.5,
        -0.0,
        1e308,
        -1e308,
        5e-324,
        2**63,
        2**63 - 1,
        -(2**63),
        10**400,
        Raw("NaN"),
        Raw("Infinity"),
        Raw("-Infinity"),
        Raw("1e999"),
        Raw("1" * 5000),
        Raw("-" + "9" * 4299),
        "64000000",
    ]
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS | st.text(max_size=8) | st.floats() | st.integers()
ABSURD = st.recursive(
    SCALARS | st.just(DEEP),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | TEXTS, inner, max_size=3),
    max_leaves=6,
)


def sampled_or_absurd(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values) | ABSURD


def object_documents(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with any of these keys, and with unknown ones."""
    return st.fixed_dictionaries({}, optional={**fields, "unknown": ABSURD})


def model_entries(*names: str) -> st.SearchStrategy[Any]:
    """An entry of /api/tags, /api/ps or /v1/models; ``names`` are those of honest models among others."""
    name = sampled_or_absurd(*names, *(name.upper() for name in names), *(f"{name} " for name in names))
    return (
        object_documents(
            name=name,
            model=name,
            id=name,
            digest=sampled_or_absurd("sha256:" + "0" * 64, "no digest"),
            size=NUMBERS | ABSURD,
            size_vram=NUMBERS | ABSURD,
            modified_at=sampled_or_absurd("2026-01-01T00:00:00.123456789Z", "9998-01-01T00:00:00Z"),
            expires_at=sampled_or_absurd("2318-01-01T00:00:00Z", "0001-01-01T00:00:00Z"),
            context_length=ABSURD,
            details=object_documents(family=ABSURD, families=ABSURD, parameter_size=ABSURD, quantization_level=ABSURD)
            | ABSURD,
            object=ABSURD,
            created=ABSURD,
            owned_by=sampled_or_absurd("vllm", "llamacpp"),
            meta=object_documents(size=ABSURD, n_params=ABSURD) | ABSURD,
            max_model_len=ABSURD,
        )
        | ABSURD
    )


def listings(key: str, *names: str) -> st.SearchStrategy[Any]:
    models = st.lists(model_entries(*names), max_size=4)
    return st.one_of(models, models, ABSURD, st.just(DEEPER)).map(lambda value: {key: value}) | ABSURD


def make_model_entries(count: int) -> list[dict[str, Any]]:
    return [{"name": f"many-{number}:1b", "id": f"many-{number}:1b", "size_vram": number} for number in range(count)]


def ollama_answers(*names: str) -> st.SearchStrategy[Mapping[str, Any]]:
    """The answers of an Ollama by path; the values are documents for ``json_bytes``."""
    return st.fixed_dictionaries(
        {
            "/api/version": st.one_of(
                TEXTS.map(lambda text: {"version": text}),
                st.just({"version": "0.12.6"}),
                object_documents(version=ABSURD),
            ),
            "/api/tags": listings("models", *names),
            "/api/ps": listings("models", *names),
            "/v1/models": listings("data", *names),
        }
    )


def openai_answers(*names: str) -> st.SearchStrategy[Mapping[str, Any]]:
    return st.fixed_dictionaries(
        {
            "/v1/models": listings("data", *names),
            "/health": ABSURD,
            "/props": object_documents(
                build_info=ABSURD,
                total_slots=ABSURD,
                default_generation_settings=object_documents(n_ctx=ABSURD) | ABSURD,
            )
            | ABSURD,
            "/version": object_documents(version=ABSURD) | ABSURD,
        }
    )


# -- nvidia-smi ------------------------------------------------------------------------------------------------------

HONEST_UUID = "GPU-5a1e0000-0000-4000-8000-000000000001"
CELLS = st.sampled_from(
    [
        "",
        "0",
        "-1",
        "200",
        "²",
        "٣",
        "½",
        "nan",
        "inf",
        "1e308",
        "9223372036854775808",
        "999999999999",
        "0.000000001",
        "[N/A]",
        "ERR!",
        "GPU-",
        HONEST_UUID,
        "GPU-\x1b[31mred",
        "x" * 5000,
        "\x1b]0;owned\x07",
        "a\x00b",
        "\u202etxt",
        "0xffffffffffffffff",
        "P99",
        "Enabled",
        "24564",
        "550.54.15",
        "${HOME}",
        "[bold]",
    ]
)


def gpu_tables(columns: int) -> st.SearchStrategy[bytes]:
    row = st.lists(CELLS, min_size=columns, max_size=columns + 2).map(", ".join)
    uuid = st.sampled_from([HONEST_UUID, "GPU-aaaaaaaa-0000", "MIG-", "nonsense"])
    started = st.tuples(st.sampled_from(["0", "1", "-1", "999999999999"]), uuid, row).map(
        lambda cells: ", ".join((cells[0], cells[1], *cells[2].split(", ")[2:]))
    )
    lines = st.lists(started | row | TEXTS, max_size=6).map("\n".join)
    flood = st.sampled_from([b"\n" * (1 << 20), b",,,\n" * (1 << 18), b"," * (1 << 20), b"x" * (1 << 20)])
    return lines.map(lambda text: text.encode("utf-8", "replace")) | st.binary(max_size=200) | flood

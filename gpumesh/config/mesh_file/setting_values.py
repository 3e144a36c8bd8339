"""The single values and lists that keys of mesh.yaml accept, each with its form in the JSON Schema.

``file_schema`` has the keys that take them.
"""

from __future__ import annotations

from typing import Any

from gpumesh.config import listen_address, value_parsers
from gpumesh.config.mesh_file.value_types import (
    NUMBER,
    TRUE_OR_FALSE,
    Choice,
    JsonSchema,
    ListOf,
    Scalar,
    duration,
    integer,
    text,
)
from gpumesh.config.redis_url import parse_redis_url
from gpumesh.topology import EventKind


def _one_or_list(member: JsonSchema, **list_keywords: Any) -> JsonSchema:
    """Returns the JSON Schema for a list of ``member``, or a single one. ``list_keywords`` are further keywords of the
    list's schema."""
    return {"anyOf": [member, {"type": "array", "items": member, **list_keywords}]}


# -- single values ---------------------------------------------------------------------------------------------------

ANY_TEXT = text(str)
NAME = text(value_parsers.parse_name, pattern=value_parsers.NAME_PATTERN)
LINE = text(value_parsers.parse_line)
PORT = integer(1, 65535)
HOST = text(value_parsers.parse_host)
USER = text(value_parsers.parse_user)
ALIAS = text(value_parsers.parse_alias)
VARIABLE = text(value_parsers.parse_variable_name, pattern="^[A-Za-z_][A-Za-z0-9_]*$")
PATH = text(value_parsers.parse_path)
JUMP = text(value_parsers.parse_jump)
LISTEN_ENTRY = text(listen_address.parse_listen_entry, examples=["127.0.0.1:11430", "unix:/run/user/1000/gpumesh.sock"])
URL = text(value_parsers.parse_url, pattern="^https?://", examples=["http://127.0.0.1:11434"])
WEBHOOK = text(value_parsers.parse_webhook, pattern="^https?://", examples=["https://example.org/hook"])
REDIS_URL = text(parse_redis_url, examples=["redis://localhost:6379/0"])
SHA256 = text(value_parsers.parse_sha256, pattern=value_parsers.SHA256_PATTERN)
ORIGIN = text(value_parsers.parse_origin)
INTERVAL = duration(0.1, 300)
LONG_WAIT = duration(0.1, 86400)
QUIET = duration(1, 7 * 86400)
HEARTBEAT = Scalar(
    value_parsers.parse_heartbeat,
    {
        "anyOf": [
            {"type": "string", "pattern": rf"^off$|{value_parsers.DURATION_PATTERN}", "examples": ["10s", "off"]},
            {"const": False},  # a YAML parser may read ``off`` as false
        ]
    },
)
POOL_MODEL = text(value_parsers.parse_pool_model, examples=["llama3.3:70b", "~/models/llama-3.3-70b-q4_k_m.gguf"])
HOST_FOLDER = text(value_parsers.parse_host_folder, examples=["~/llama.cpp/build/bin"])
SIZE = text(value_parsers.parse_size, pattern=value_parsers.SIZE_PATTERN, examples=["20GiB"])
WEIGHT = Scalar(value_parsers.parse_weight, {"type": "number", "exclusiveMinimum": 0, "maximum": 1000}, NUMBER)
HOURLY_PRICE = Scalar(
    value_parsers.parse_hourly_price,
    {"type": "number", "minimum": 0, "maximum": value_parsers.MAX_HOURLY_PRICE},
    NUMBER,
)
RATE = Scalar(
    value_parsers.parse_rate,
    {
        "anyOf": [
            {"type": "integer", "minimum": 1},
            {"type": "string", "pattern": value_parsers.RATE_PATTERN, "examples": ["60/m"]},
        ]
    },
)
TOKENS = Scalar(
    value_parsers.parse_tokens,
    {
        "anyOf": [
            {"type": "integer", "minimum": 1, "maximum": value_parsers.MOST_TOKENS},
            {"type": "string", "pattern": value_parsers.TOKENS_PATTERN, "examples": ["2M"]},
        ]
    },
)
BOOLEAN = Scalar(value_parsers.parse_boolean, {"type": "boolean"}, TRUE_OR_FALSE)

# -- lists -----------------------------------------------------------------------------------------------------------

_TEXT = ANY_TEXT.schema

PATHS = ListOf(PATH, _one_or_list(_TEXT))
JUMPS = ListOf(JUMP, _one_or_list(_TEXT), split=value_parsers.split_jumps)
LINES = ListOf(LINE, _one_or_list(_TEXT))
COMMAND = ListOf(ANY_TEXT, _one_or_list(_TEXT, minItems=1), value_parsers.parse_command, value_parsers.check_argv)
LISTEN = ListOf(LISTEN_ENTRY, _one_or_list(LISTEN_ENTRY.schema, minItems=1, maxItems=2))
URLS = ListOf(URL, {"type": "array", "items": URL.schema, "minItems": 1, "maxItems": 16})
NODE_NAMES = ListOf(NAME, _one_or_list(_TEXT, minItems=1))
MODELS = ListOf(LINE, _one_or_list(_TEXT, minItems=1))
CONTEXT_STEPS = ListOf(
    integer(1, 1 << 31), {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1}
)
SPLIT = ListOf(integer(0, 10_000), {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1})
ORIGINS = ListOf(ORIGIN, _one_or_list(_TEXT))
_EVENT = Choice(EventKind)
EVENTS = ListOf(_EVENT, _one_or_list(_EVENT.schema, minItems=1))

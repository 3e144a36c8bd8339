"""Messages between a supervisor and its worker survive encoding, each on one line."""

from __future__ import annotations

import json
from pathlib import Path, PurePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.topology import AddressCommand, HostKeyPolicy, SshSpec, Target, TransportKind
from gpumesh.tunnels.transport import ConnectionInfo, ConnectRequest
from gpumesh.tunnels.workers import protocol
from gpumesh.tunnels.workers.protocol import (
    Close,
    Done,
    Failed,
    ForwardFailed,
    FromWorker,
    Input,
    Kill,
    Lost,
    OutputPiece,
    Ping,
    Pong,
    Prompt,
    Reply,
    StartCommand,
    ToWorker,
    decode_message,
    encode_message,
)

texts = st.text(max_size=40)
maybe = st.none() | texts
ids = st.integers(0, 1 << 40)
seconds = st.floats(0, 1e6, allow_nan=False)
# With lone surrogates: Python's way to keep a file name that is no text.
paths = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=40).map(PurePath).map(Path)
targets = st.builds(Target, texts, st.integers(1, 65535), st.sampled_from(["http", "https"]), texts)
specs = st.builds(
    SshSpec,
    host=texts,
    port=st.integers(1, 65535),
    user=texts,
    identity_files=st.lists(paths, max_size=3).map(tuple),
    known_hosts=paths,
    host_key_policy=st.sampled_from(HostKeyPolicy),
    proxy_jump=st.lists(texts, max_size=3).map(tuple),
    password_env=maybe,
    passphrase_env=maybe,
    agent=st.booleans(),
    alias=maybe,
    transport=st.sampled_from(TransportKind),
    connect_timeout_s=seconds,
    keepalive_s=seconds,
    address_from=st.none() | st.builds(AddressCommand, st.lists(texts, min_size=1).map(tuple), seconds),
)
messages: st.SearchStrategy[ToWorker | FromWorker] = st.one_of(
    st.builds(
        ConnectRequest,
        texts,
        specs,
        st.lists(targets, max_size=3).map(tuple),
        st.lists(st.tuples(st.sampled_from(["password", "passphrase"]), texts), max_size=2).map(tuple),
        st.booleans(),
        maybe,
        st.booleans(),
        texts,
        st.booleans(),
    ),
    st.builds(StartCommand, ids, texts, st.none() | seconds, ids, st.booleans(), st.booleans()),
    st.builds(Input, ids, texts),
    st.builds(Kill, ids),
    st.builds(Ping, ids, seconds),
    st.builds(Reply, ids, maybe),
    st.just(Close()),
    st.builds(ConnectionInfo, st.none() | seconds, texts, maybe),
    st.builds(Failed, texts, texts, maybe),
    st.builds(Lost, texts, texts, maybe),
    st.builds(OutputPiece, ids, texts, texts),
    st.builds(Done, ids, st.none() | st.integers(0, 255), st.booleans(), maybe),
    st.builds(Pong, ids, st.none() | seconds),
    st.builds(ForwardFailed, targets, texts, texts),
    st.builds(Prompt, ids, texts, st.booleans()),
)


@given(messages)
def test_a_message_survives_encoding_and_decoding(message: ToWorker | FromWorker) -> None:
    line = encode_message(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode_message(line) == message


def test_every_kind_of_message_is_known() -> None:
    """A kind that ``decode_message`` does not know would end the tunnel."""
    kinds = {*ToWorker.__args__, *FromWorker.__args__}
    assert set(protocol._TYPES_BY_NAME.values()) == kinds
    assert set(protocol._TYPES_BY_NAME) == {kind.__name__ for kind in kinds}


def test_secrets_are_in_no_repr() -> None:
    setup = ConnectRequest("n", SshSpec("h"), (), (("password", "hunter2"),))
    assert "hunter2" not in f"{setup!r} {Reply(1, 'hunter2')!r}"
    assert decode_message(encode_message(setup)) == setup


@given(st.binary(max_size=200))
def test_noise_raises_value_error(line: bytes) -> None:
    with pytest.raises(ValueError):
        decode_message(line)


jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(
    st.sampled_from(sorted(protocol._TYPES_BY_NAME)),
    st.dictionaries(st.sampled_from(["id", "ssh", "code", "x"]), jsons),
)
def test_a_message_with_wrong_fields_raises_value_error(kind: str, fields: dict[str, object]) -> None:
    line = json.dumps({**fields, "kind": kind}).encode()
    try:
        message = decode_message(line)
    except ValueError:
        return
    assert decode_message(encode_message(message)) == message or "nan" in repr(message)


@pytest.mark.parametrize("line", [b"", b"{}", b"[]", b"null", b'{"kind": []}', b'{"kind": "Setupp"}', b"[" * 100_000])
def test_malformed_lines_raise_value_error(line: bytes) -> None:
    with pytest.raises(ValueError):
        decode_message(line)

"""A process of another user of this machine: it connects to a local port or a Unix socket and sends a few bytes."""

from __future__ import annotations

import asyncio
import sys

NOBODY = 65534
ANOTHER = 12345  # in no /etc/passwd

_PROGRAM = """
import encodings.idna, errno, os, socket, sys  # imported first: the other user may not read Python's files
uid, place, way = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if way == "before":  # the present user makes the socket, another user uses it
    sock = socket.create_connection(("127.0.0.1", int(place)))
os.setgroups([])
os.setgid(uid)
os.setuid(uid)
try:
    if way == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(place)
    elif way == "mapped":  # as Java connects to 127.0.0.1
        sock = socket.socket(socket.AF_INET6)
        sock.connect(("::ffff:127.0.0.1", int(place)))
    elif way != "before":
        sock = socket.create_connection(("::1" if way == "ipv6" else "127.0.0.1", int(place)))
    sock.settimeout(20)
    sock.sendall(b"hello")
    if way == "goes":
        sys.exit(0)
    sock.shutdown(socket.SHUT_WR)
    answer = b""
    while piece := sock.recv(65536):
        answer += piece
except OSError as error:  # each call reports a reset in its own way
    reset = isinstance(error, (ConnectionResetError, BrokenPipeError)) or error.errno == errno.ENOTCONN
    print("reset" if reset else type(error).__name__)
else:
    print("answer", answer.decode())
"""


async def connect_as(place: int | str, *, uid: int = NOBODY, way: str = "ipv4") -> str:
    """``answer hello`` from an echo, ``reset``, or the name of another error.

    ``way``: ipv4, ipv6, mapped, unix, goes (sends and ends), before (connects as the user of the tests, and becomes
    the other user after that)."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-c", _PROGRAM, str(uid), str(place), way, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    return output.decode().strip()

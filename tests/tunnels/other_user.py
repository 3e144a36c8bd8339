"""A process of another user of this machine, that connects to a local port or a Unix socket and sends a few bytes."""

from __future__ import annotations

import asyncio
import sys

NOBODY = 65534
ANOTHER = 12345  # in no /etc/passwd

_PROGRAM = """
import encodings.idna, errno, os, socket, sys  # all before: the other user may not read where Python is
uid, place, way = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if way == "before":  # the socket is made by who we are now, and used by another
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
except OSError as error:  # whichever call comes first after a reset says it in its own way
    reset = isinstance(error, (ConnectionResetError, BrokenPipeError)) or error.errno == errno.ENOTCONN
    print("reset" if reset else type(error).__name__)
else:
    print("answer", answer.decode())
"""


async def connect_as(place: int | str, *, uid: int = NOBODY, way: str = "ipv4") -> str:
    """``answer hello`` from an echo, ``reset``, or the name of another error.

    ``way``: ipv4, ipv6, mapped, unix, goes (sends and is gone), before (connects as who runs the tests, and is the
    other user from then on)."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-c", _PROGRAM, str(uid), str(place), way, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    return output.decode().strip()

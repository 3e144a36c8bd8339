"""A client with one stream, which notes how long a gateway worked without passing on a token.

Run as a program, so that nothing else delays it: ``python listener.py PORT PID MODEL``. Each line that it prints is a
new maximum: seconds of CPU that the process PID used between two pieces of the stream. A machine with much else to do
makes pieces come late, but does not let that process work more.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path


def main(port: int, pid: int, model: str) -> None:
    body = json.dumps({"model": model, "stream": True, "messages": []}, separators=(",", ":")).encode()
    used = Path(f"/proc/{pid}/schedstat")
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(
            b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        longest, last = -1.0, None
        while connection.recv(1 << 16):
            now = int(used.read_text().split()[0]) / 1e9
            if last is not None and now - last > longest:
                longest = now - last
                print(longest, flush=True)
            last = now
    print("ended", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

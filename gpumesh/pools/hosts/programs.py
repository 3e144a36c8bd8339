"""llama.cpp's programs on a host: where they are, which version, and which devices they see.

One shell script finds all of it in one round trip. ``ggml-rpc-server`` has no option for its version, and prints the
version of its protocol only when it starts. So it is started on an address that no host has (192.0.2.1, RFC 5737, a
network for documentation): it prints its version and its devices, cannot listen, and ends. Read in
llama.cpp's tools/rpc/rpc-server.cpp and ggml/src/ggml-rpc/ggml-rpc.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gpumesh.errors import ExecError, PoolProgramMissing, PoolVersionsDiffer
from gpumesh.pools.hosts.route import HostRoute, is_host_path
from gpumesh.text.printable import printable
from gpumesh.text.quoting import paste_command

MIB = 1 << 20
LLAMA_SERVER = "llama-server"
RPC_SERVER = "ggml-rpc-server"
TIMEOUT_S = 30.0  # a CUDA program needs some seconds for its first look at the GPUs
OUTPUT_BYTES = 256 << 10
MAX_DEVICES = 64
MAX_MIB = 1 << 24

# Where llama.cpp is when it is not on PATH: built from source, unpacked from a release, in its Docker image (/app), on
# a rented pod (/workspace), by Homebrew.
USUAL_FOLDERS = (
    "$HOME/llama.cpp/build/bin",
    "$HOME/llama.cpp/bin",
    "$HOME/llama.cpp",
    "$HOME/.local/bin",
    "/usr/local/bin",
    "/opt/llama.cpp/build/bin",
    "/opt/llama.cpp/bin",
    "/opt/llama.cpp",
    "/usr/local/llama.cpp/bin",
    "/workspace/llama.cpp/build/bin",
    "/workspace/llama.cpp/bin",
    "/workspace/llama.cpp",
    "/app",
    "/opt/homebrew/bin",
    "/home/linuxbrew/.linuxbrew/bin",
)

_QUOTED_FOLDERS = " ".join(f'"{folder}"' for folder in USUAL_FOLDERS)

# The argument is the folder of ``llama_cpp_dir``, or empty. Each part of the output begins with a line of MARK. The
# script has no single quote and no line break, for login shells such as csh.
_MARK = "@gpumesh@"
_FIND_SCRIPT = (
    "d=$1; case $d in \\~) d=$HOME;; \\~/*) d=$HOME/${d#??};; esac; "
    "find_program() { p=; for n; do "
    'if [ -n "$d" ]; then set -- "$d" "$d/bin" "$d/build/bin"; else '
    'p=$(command -v "$n"); case $p in /*) return 0;; esac; p=; '
    f"set -- {_QUOTED_FOLDERS}; fi; "
    'for f; do if [ -f "$f/$n" ] && [ -x "$f/$n" ]; then p=$f/$n; return 0; fi; done; done; return 1; }; '
    # The libraries of a release lie beside the program itself, which PATH may have a link to.
    'run() { r=$(readlink -f "$p") || r=$p; echo "$r"; '
    "LD_LIBRARY_PATH=${r%/*}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} CUDA_DEVICE_ORDER=PCI_BUS_ID "
    '"$p" "$@" </dev/null 2>&1; }; '
    f'echo "{_MARK} home"; echo "$HOME"; '
    f'echo "{_MARK} cores"; nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null; '
    f'echo "{_MARK} memory"; cat /proc/meminfo 2>/dev/null; '
    f'echo "{_MARK} ports"; grep -h -o " [0-9A-F]*:[0-9A-F]* [0-9A-F]*:[0-9A-F]* 0A " '
    "/proc/net/tcp /proc/net/tcp6 2>/dev/null; "
    f'if find_program {RPC_SERVER} rpc-server; then echo; echo "{_MARK} rpc $p"; '
    "run -H 192.0.2.1 -p 50052; fi; "
    f'if find_program {LLAMA_SERVER}; then echo; echo "{_MARK} server $p"; run --version; '
    f'echo; echo "{_MARK} devices"; run --list-devices; fi; echo; echo "{_MARK} end"'
)
_DEVICE = re.compile(
    r"\s+(?P<name>[A-Za-z][A-Za-z0-9_.:-]{0,31}): (?P<description>.{0,200}) "
    r"\((?P<total>[0-9]{1,9}) MiB, (?P<free>[0-9]{1,9}) MiB free\)"
)
_RPC_VERSION = re.compile(r"Starting RPC server v([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})")
_BUILD = re.compile(r"version: (?P<version>.{1,100})")
_MEMINFO = re.compile(r"(MemTotal|MemAvailable):\s+([0-9]{1,15}) kB")

RpcVersion = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class ProgramDevice:
    """A device as llama.cpp lists it: ``CUDA0``, with the GPU's name as ``description``."""

    name: str
    description: str
    total_bytes: int
    free_bytes: int

    @property
    def is_cpu(self) -> bool:
        return self.name == "CPU"

    @property
    def kind(self) -> str:
        """``CUDA`` of ``CUDA0``."""
        return self.name.rstrip("0123456789")


@dataclass(frozen=True, slots=True)
class HostPrograms:
    """The result of ``find_programs``. A path is ``None`` if the program is not there.

    ``build`` is llama-server's version by its own words (``10434 (7e4c0a9)``), ``rpc`` the version of the protocol that
    ggml-rpc-server speaks; ``None``: unknown. ``server_folder`` and ``rpc_folder`` have their libraries. ``devices``
    are the GPUs, or the CPU of a host without one. Something listens on ``used_ports``.
    """

    node: str
    server: str | None = None
    server_folder: str | None = None
    rpc_server: str | None = None
    rpc_folder: str | None = None
    build: str | None = None
    rpc: RpcVersion | None = None
    devices: tuple[ProgramDevice, ...] = ()
    home: str | None = None
    cores: int | None = None
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None
    used_ports: frozenset[int] = frozenset()
    looked_in: str | None = None

    @property
    def gpus(self) -> tuple[ProgramDevice, ...]:
        """The GPUs, in the order of nvidia-smi. A program built for CUDA and Vulkan lists each GPU twice: the first
        kind counts. A library such as BLAS is listed as a device without memory. Vulkan also lists the GPU of the
        mainboard, which nvidia-smi does not know."""
        devices = [device for device in self.devices if not device.is_cpu and device.total_bytes]
        same_kind = tuple(device for device in devices if device.kind == devices[0].kind)
        named_nvidia = tuple(device for device in same_kind if "NVIDIA" in device.description)
        return named_nvidia or same_kind

    @property
    def version(self) -> str:
        """Both versions, for a message."""
        parts = [] if self.build is None else [f"llama.cpp {self.build}"]
        if self.rpc is not None:
            parts.append(f"RPC protocol {'.'.join(map(str, self.rpc))}")
        return ", ".join(parts) or "an unknown version"

    def need_server(self) -> str:
        """The path of llama-server. Raises PoolProgramMissing."""
        return self._need(self.server, LLAMA_SERVER)

    def need_rpc_server(self) -> str:
        """The path of ggml-rpc-server. Raises PoolProgramMissing."""
        return self._need(self.rpc_server, RPC_SERVER)

    def _need(self, path: str | None, program: str) -> str:
        if path is None:
            places = "on PATH and in the usual folders" if self.looked_in is None else f"in {self.looked_in}"
            raise PoolProgramMissing(
                f"there is no {program} on {self.node} (looked {places})", hint=_install_hint(program), node=self.node
            )
        return path


def _install_hint(program: str) -> str:
    clone = paste_command("git clone https://github.com/ggml-org/llama.cpp ~/llama.cpp")
    return (
        f"build llama.cpp there: {clone}, then with cmake and `-DGGML_CUDA=ON -DGGML_RPC=ON` the target {program};"
        " or unpack a release of it; the pool's `llama_cpp_dir` names another folder"
    )


async def find_programs(
    route: HostRoute, node: str, *, llama_cpp_dir: str | None = None, timeout_s: float = TIMEOUT_S
) -> HostPrograms:
    """Looks for llama.cpp's programs on the host: in ``llama_cpp_dir``, or else on PATH and in the usual folders.

    A program that is missing is ``None`` in the result (``HostPrograms.need_server``). Raises TunnelDown, and ExecError
    when the host does not answer in time, or runs no POSIX shell.
    """
    argv = ("sh", "-c", _FIND_SCRIPT, "gpumesh-find", llama_cpp_dir or "")
    try:
        result = await route.exec(argv, timeout_s=timeout_s, limit_bytes=OUTPUT_BYTES)
    except ExecError as error:
        raise ExecError(
            f"looking for llama.cpp on {node} failed: {error.message}",
            hint=error.hint or f"{LLAMA_SERVER} or {RPC_SERVER} may hang there, when it is asked for its version",
            node=node,
        ) from error
    programs = read_programs(result.stdout, node, looked_in=llama_cpp_dir)
    if programs is None:
        text = printable(result.stdout[-300:] or result.stderr[-300:])
        raise ExecError(f"{node} did not run the script that looks for llama.cpp: {text or 'no output'}", node=node)
    return programs


def read_programs(output: bytes, node: str, *, looked_in: str | None = None) -> HostPrograms | None:
    """The programs from the script's output; ``None`` if it is not the script's output. Never raises."""
    parts = _split_parts(output.decode("utf-8", "replace"))
    if "end" not in parts:
        return None
    server, server_folder, server_lines = _read_program(parts.get("server"))
    rpc_server, rpc_folder, rpc_lines = _read_program(parts.get("rpc"))
    _, device_lines = parts.get("devices", ("", []))
    devices = _read_devices(rpc_lines) or _read_devices(device_lines)
    memory = {name: int(kib) << 10 for name, kib in _MEMINFO.findall("\n".join(parts.get("memory", ("", []))[1]))}
    home = _first_line(parts.get("home"))
    cores = _first_line(parts.get("cores")) or ""
    rpc = _search(_RPC_VERSION, rpc_lines)
    build = _search(_BUILD, server_lines)
    return HostPrograms(
        node=node,
        server=server,
        server_folder=server_folder,
        rpc_server=rpc_server,
        rpc_folder=rpc_folder,
        build=printable(build["version"]) if build else None,
        rpc=(int(rpc[1]), int(rpc[2]), int(rpc[3])) if rpc else None,
        devices=devices,
        home=home if is_host_path(home) else None,
        cores=int(cores) if cores.isascii() and cores.isdigit() and 0 < len(cores) < 5 else None,
        memory_total_bytes=memory.get("MemTotal"),
        memory_free_bytes=memory.get("MemAvailable"),
        used_ports=_read_ports(parts.get("ports", ("", []))[1]),
        looked_in=looked_in,
    )


_Part = tuple[str, list[str]]
"""The text behind a part's name, and the part's lines."""


def _split_parts(text: str) -> dict[str, _Part]:
    parts: dict[str, _Part] = {}
    lines: list[str] = []
    for line in text.split("\n"):
        if line.startswith(_MARK + " "):
            name, _, rest = line.removeprefix(_MARK + " ").partition(" ")
            lines = []
            parts.setdefault(name, (rest, lines))
        else:
            lines.append(line)
    return parts


def _first_line(part: _Part | None) -> str | None:
    return part[1][0].strip() if part is not None and part[1] else None


def _read_program(part: _Part | None) -> tuple[str | None, str | None, list[str]]:
    """A program's path, the folder of the file that the path leads to, and the lines that the program wrote."""
    if part is None or not is_host_path(part[0]):
        return None, None, []
    path, lines = part
    target = lines[0] if lines and is_host_path(lines[0]) else path
    return path, target.rpartition("/")[0] or "/", lines[1:]


def _search(pattern: re.Pattern[str], lines: Iterable[str]) -> re.Match[str] | None:
    return next((match for line in lines if (match := pattern.search(line[:500]))), None)


def _read_devices(lines: Sequence[str]) -> tuple[ProgramDevice, ...]:
    devices: list[ProgramDevice] = []
    for line in lines:
        match = _DEVICE.fullmatch(line[:300].rstrip())
        if match is None or len(devices) == MAX_DEVICES:
            continue
        total, free = int(match["total"]), int(match["free"])
        if total <= MAX_MIB and free <= MAX_MIB:
            devices.append(ProgramDevice(match["name"], printable(match["description"], 80), total * MIB, free * MIB))
    return tuple(devices)


def _read_ports(lines: Iterable[str]) -> frozenset[int]:
    """The ports of the listening sockets, from rows of /proc/net/tcp: ``LOCAL:PORT REMOTE:PORT STATE``."""
    ports = set()
    for line in lines:
        address, _, port = line.strip().partition(" ")[0].rpartition(":")
        if address and len(port) == 4:
            ports.add(int(port, 16) if re.fullmatch(r"[0-9A-F]{4}", port) else 0)
    return frozenset(ports - {0})


def check_versions(programs: Mapping[str, HostPrograms], head: str) -> None:
    """Returns if llama-server on ``head`` and ggml-rpc-server on the other hosts fit together, as far as is known.

    llama-server itself compares only the first two numbers of the protocol's version, and starts without a worker that
    differs. The third number changes when the operations do (ggml-rpc.h), so it has to be the same, too. Where the
    version of the protocol is not known, the build decides. Raises PoolVersionsDiffer, with what each host has.
    """
    first = programs[head]
    for node, other in programs.items():
        if node == head:
            continue
        if first.rpc is not None and other.rpc is not None:
            differs = first.rpc != other.rpc
        else:
            differs = None not in (first.build, other.build) and first.build != other.build
        if differs:
            versions = "; ".join(f"{name} has {host.version}" for name, host in programs.items())
            raise PoolVersionsDiffer(
                f"the versions of llama.cpp do not fit together: {versions}",
                hint="install the same build of llama.cpp on all members",
                node=node,
            )

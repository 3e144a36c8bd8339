from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.probes.disk_space import FREE_SPACE_COMMAND, read_free_mib
from tests.probes.shell_host import ShellHost

HEAD = "Filesystem     1024-blocks      Used Available Capacity Mounted on\n"


@pytest.mark.parametrize(
    ("rows", "free"),
    [
        ("/dev/vda         264212084 14184928  81316336      15% /\n", 79410),
        ("overlay 1000 1000 0 100% /\n", 0),
        ("overlay 1000 1100 -100 110% /\n", 0),
        ("//server/my share  2048000 0 2048000 0% /mnt/my models\n", 2000),
        ("", None),
        ("/dev/a 1 1 1 1% /\n/dev/b 1 1 1 1% /b\n", None),
        ("df: /x: No such file or directory\n", None),
    ],
)
def test_df_output_is_read(rows: str, free: int | None) -> None:
    assert read_free_mib((HEAD + rows).encode()) == free


async def test_the_disk_with_the_models_is_asked_for(host: ShellHost) -> None:
    host.command("df", f'echo "{HEAD.strip()}"; echo "disk 9999999 1 2097152 1% $2"')
    nothing = await host.exec(FREE_SPACE_COMMAND, timeout_s=20.0)
    assert read_free_mib(nothing.stdout) is None, "no store, nothing to say"
    (host.folder / ".ollama" / "models").mkdir(parents=True)
    result = await host.exec(FREE_SPACE_COMMAND, timeout_s=20.0)
    assert read_free_mib(result.stdout) == 2048
    assert result.stdout.decode().endswith(f"{host.folder}/.ollama/models\n")


async def test_the_output_of_a_real_df_is_read(host: ShellHost) -> None:
    (host.folder / ".ollama").mkdir()
    result = await host.exec(FREE_SPACE_COMMAND, timeout_s=20.0)
    free = read_free_mib(result.stdout)
    assert free is not None
    assert 0 < free < 1 << 40


async def test_the_hosts_ollama_models_variable_comes_first(host: ShellHost, tmp_path: Path) -> None:
    elsewhere = tmp_path / "my models; echo no"
    elsewhere.mkdir()
    host.command("df", f'echo "{HEAD.strip()}"; echo "disk 9 1 4096 1% $2"')
    result = await host.exec(("env", f"OLLAMA_MODELS={elsewhere}", *FREE_SPACE_COMMAND), timeout_s=20.0)
    assert result.stdout.decode().endswith(f"1% {elsewhere}\n")


@given(st.binary(max_size=300))
def test_no_output_raises(output: bytes) -> None:
    free_mib = read_free_mib(output)
    assert free_mib is None or free_mib >= 0

"""`gpumesh --help`, and `status` on a running mesh, do not pay for yaml; and no command pays for pydantic."""

from __future__ import annotations

import subprocess
import sys


def test_reading_the_file_imports_no_pydantic() -> None:
    program = (
        "import sys; from pathlib import Path; from gpumesh import config\n"
        "text = 'nodes: [{name: a, ssh: {host: h}}]'\n"
        "mesh = config.parse(text, file='mesh.yaml', env={}, home=Path('/home'))\n"
        "config.check(mesh); config.dump_effective(mesh); config.schema()\n"
        "print('pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


def test_finding_the_file_imports_neither_yaml_nor_pydantic() -> None:
    program = (
        "import sys; from gpumesh import config; from gpumesh.config import environment\n"
        "environment.runtime_dir(); config.parse_listen_address('1', has_key=False)\n"
        "try: config.find_config()\n"
        "except Exception: pass\n"
        "print([name for name in ('yaml', 'pydantic', 'subprocess', 'asyncio') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"

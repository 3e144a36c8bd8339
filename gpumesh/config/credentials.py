"""Reads secrets from environment variables, and keeps the variables from programs that we start. Masks secrets in text.

No other module reads secrets. mesh.yaml and the specs hold only the names of the variables.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from gpumesh.errors import SecretMissing

MAX_SECRET_FILE_BYTES = 4096
MIN_MASKED_CHARACTERS = 6  # a shorter value could also be a part of ordinary words

# The variables that a mesh.yaml names for a secret. The whole process has one set, as it has one environment: code that
# starts a program need not know which mesh the variables belong to.
_withheld: set[str] = set()

# Matches the names of variables that hold a secret. Their values enter neither the specs nor any output.
_SECRET_NAME = re.compile(
    r"(PASSWORD|PASSWD|PASSPHRASE|SECRET|API_?KEY|((^|_)(PASS|SECRET_?KEY|TOKEN|ACCESS_?KEY|CREDENTIALS?)))$",
    re.IGNORECASE,
)


def read_secret(variable: str, *, node: str | None = None) -> str:
    """Returns the secret in the environment variable ``variable``. Raises SecretMissing, which names the variable, when
    the variable is empty or not set. ``node``: the node that needs the secret."""
    value = os.environ.get(variable, "")
    if not value:
        state = "empty" if variable in os.environ else "not set"
        raise SecretMissing(
            f"the variable {variable} is {state}, but mesh.yaml names it for a secret",
            hint=f"set it before starting gpumesh, for example: export {variable}=…",
            node=node,
        )
    return value


def read_secret_file(path: Path) -> str:
    """Returns the secret that is the whole content of a file, without the blanks and line breaks around it. Raises
    SecretMissing, which names the file, when the file cannot be read, is empty or too large, or when other users may
    write it. Others may read it: a secret of a container often is mounted so."""
    problem = None
    secret = ""
    try:
        # O_NONBLOCK is for a FIFO: without it, opening a FIFO waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                problem = "is not a regular file"
            elif stat.S_IMODE(mode) & 0o022:
                problem = "may be written to by other users"
            else:
                data = file.read(MAX_SECRET_FILE_BYTES + 1)
                secret = data.decode().strip()
                if len(data) > MAX_SECRET_FILE_BYTES:
                    problem = "is too large to be one key"
                elif not secret:
                    problem = "is empty"
                elif not secret.isprintable():
                    problem = "holds more than one line"
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
    except UnicodeDecodeError:
        problem = "holds no text"
    if problem is not None:
        raise SecretMissing(
            f"the file {path} {problem}, but mesh.yaml names it for a secret",
            hint="it holds one line, the key, and belongs to you (chmod 600)",
        )
    return secret


def is_secret_set(variable: str) -> bool:
    """Whether ``read_secret`` would return a secret."""
    return bool(os.environ.get(variable))


def withhold_variables(variables: Iterable[str]) -> None:
    """Keeps these variables from all programs that this process starts from now on (``child_environment``)."""
    _withheld.update(variables)


def withheld_variables() -> frozenset[str]:
    """Returns the names of all variables that ``withhold_variables`` has got so far."""
    return frozenset(_withheld)


def names_secret(variable: str) -> bool:
    """Whether the variable holds a secret, judged by its name (``RUNPOD_API_KEY``, ``DB_PASSWORD``)."""
    return _SECRET_NAME.search(variable) is not None


def mask_secrets(text: str) -> str:
    """Returns ``text`` with asterisks in place of the values of all variables whose names say that they hold a secret
    (``names_secret``), or that a mesh.yaml names for a secret."""
    secrets = {value for name, value in os.environ.items() if names_secret(name) or name in _withheld}
    for secret in sorted(secrets, key=len, reverse=True):  # longest first: a secret may be a part of a longer secret
        if len(secret) >= MIN_MASKED_CHARACTERS:
            text = text.replace(secret, "********")
    return text

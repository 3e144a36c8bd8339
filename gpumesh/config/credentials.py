"""The only reader of secrets. They live in environment variables; mesh.yaml and the specs know only their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from gpumesh.errors import SecretMissing

# Variables that some mesh.yaml of this process names for a secret. Of the whole process, as the environment itself is:
# whoever starts a program must not have to know whose mesh the variables belong to.
_withheld: set[str] = set()

# Variables that by their name hold a secret: their values enter neither the specs nor anything printed.
_SECRET_NAME = re.compile(
    r"(PASSWORD|PASSWD|PASSPHRASE|SECRET|API_?KEY|((^|_)(PASS|SECRET_?KEY|TOKEN|ACCESS_?KEY|CREDENTIALS?)))$",
    re.IGNORECASE,
)


def read_secret(variable: str, *, node: str | None = None) -> str:
    """The secret in ``variable``. Raises SecretMissing, naming the variable, when it is not set or empty."""
    value = os.environ.get(variable, "")
    if not value:
        state = "empty" if variable in os.environ else "not set"
        raise SecretMissing(
            f"the variable {variable} is {state}, but mesh.yaml names it for a secret",
            hint=f"set it before starting gpumesh, for example: export {variable}=…",
            node=node,
        )
    return value


def is_secret_set(variable: str) -> bool:
    """Whether ``read_secret`` would find something; does not tell what."""
    return bool(os.environ.get(variable))


def withhold_variables(variables: Iterable[str]) -> None:
    """From now on no program that this process starts is given these variables (``environment.child``)."""
    _withheld.update(variables)


def withheld_variables() -> frozenset[str]:
    return frozenset(_withheld)


def names_secret(variable: str) -> bool:
    """Whether a variable's name says that it holds a secret (``RUNPOD_API_KEY``, ``DB_PASSWORD``)."""
    return _SECRET_NAME.search(variable) is not None


def mask_secrets(text: str) -> str:
    """``text`` without the value of any variable that by its name holds a secret."""
    values = {value for name, value in os.environ.items() if names_secret(name) and len(value) >= 6}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "********")
    return text

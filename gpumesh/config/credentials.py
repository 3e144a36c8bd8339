"""The only reader of secrets. Secrets are in environment variables; mesh.yaml and the specs hold only the names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from gpumesh.errors import SecretMissing

# The variables that a mesh.yaml names for a secret. There is one set for the whole process, like the environment
# itself: code that starts a program need not know which mesh the variables belong to.
_withheld: set[str] = set()

# Matches the names of variables that hold a secret. Their values enter neither the specs nor any output.
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
    """Whether ``read_secret`` would return a secret."""
    return bool(os.environ.get(variable))


def withhold_variables(variables: Iterable[str]) -> None:
    """Keeps these variables from all programs that this process starts from now on (``child_environment``)."""
    _withheld.update(variables)


def withheld_variables() -> frozenset[str]:
    return frozenset(_withheld)


def names_secret(variable: str) -> bool:
    """Whether the variable holds a secret, judged by its name (``RUNPOD_API_KEY``, ``DB_PASSWORD``)."""
    return _SECRET_NAME.search(variable) is not None


def mask_secrets(text: str) -> str:
    """``text`` without the values of variables whose names say that they hold a secret: asterisks replace them."""
    # A shorter value would also be found in ordinary words.
    values = {value for name, value in os.environ.items() if names_secret(name) and len(value) >= 6}
    for value in sorted(values, key=len, reverse=True):  # a secret may be a part of a longer one
        text = text.replace(value, "********")
    return text

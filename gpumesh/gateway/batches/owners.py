"""Whose files and batches a request may see: those that were made with its own key."""

from __future__ import annotations

from gpumesh.errors import BatchNotFound
from gpumesh.gateway.http.request import Request

# The owner of what clients of a gateway without keys have made: a name that no key of mesh.yaml can have. What the
# commands of this user have made belongs to another owner (``batches.values.COMMAND_LINE``), because every user of the
# machine can ask a gateway without keys.
NO_KEY = "(no key)"


def find_owner(request: Request) -> str:
    """The owner of what this request makes."""
    return NO_KEY if request.key is None else request.key.usage_name


def require_owner(request: Request, owner: str, subject: str) -> None:
    """Raises BatchNotFound if this owner's things are not for the sender of the request. ``subject``: what is asked
    for, such as ``file 'file-1'``."""
    if find_owner(request) != owner:
        raise BatchNotFound(f"there is no {subject}")

"""What each code of a finding or an error means and what to do about it: the text of ``gpumesh explain CODE``.

One file for each family of codes. These files are imported at the first look-up: a command that explains nothing does
not pay for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from gpumesh.audit.catalog.explanation import Explanation


class _Catalog(Mapping[str, Explanation]):
    """All explanations by code, in the order of docs/codes.md. The files with the texts are imported at first use."""

    @cached_property
    def _explanations(self) -> dict[str, Explanation]:
        from gpumesh.audit.catalog import configuration, errors, gateways, gpus, hosts, servers

        families = (hosts, gpus, servers, gateways, configuration, errors)
        return {entry.code: entry for family in families for entry in family.EXPLANATIONS}

    def __getitem__(self, code: str) -> Explanation:
        return self._explanations[code]

    def __iter__(self) -> Iterator[str]:
        return iter(self._explanations)

    def __len__(self) -> int:
        return len(self._explanations)


CATALOG: Mapping[str, Explanation] = _Catalog()


def explain(code: str) -> Explanation | None:
    """Returns the explanation of a code; ``None`` for a code that does not exist.

    Codes have lower case and dashes, but ``code`` may have upper case, and blanks or underscores instead of dashes.
    """
    normalized_code = code.strip().lower().replace("_", "-").replace(" ", "-")
    return CATALOG.get(normalized_code)


__all__ = ["CATALOG", "Explanation", "explain"]

"""gpumesh: GPUs behind SSH as one fast endpoint. The class ``Mesh`` is the entry to the library.

``Mesh`` is imported only on first use, so that the command line starts quickly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpumesh.mesh.mesh import Mesh as Mesh

__version__ = "0.1.0"
__all__ = ["Mesh", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports ``Mesh`` when ``gpumesh.Mesh`` is used for the first time (PEP 562)."""
    if name == "Mesh":
        from gpumesh.mesh.mesh import Mesh

        return Mesh
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

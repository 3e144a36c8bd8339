"""The table of the routes for files and batches."""

from __future__ import annotations

from gpumesh.batches.base import BatchStore
from gpumesh.gateway.batches.batch_routes import BatchRoutes
from gpumesh.gateway.batches.file_routes import FileRoutes
from gpumesh.gateway.http.request import Handler

# All paths that begin with the prefix share one template.
TEMPLATE_BY_PREFIX = {"/v1/files/": "/v1/files/{file}", "/v1/batches/": "/v1/batches/{batch}"}
_GET = ("GET", "HEAD")
_POST = ("POST",)
_DELETE = ("DELETE",)


def batch_handlers(store: BatchStore) -> dict[str, tuple[tuple[tuple[str, ...], Handler], ...]]:
    """The handlers by the path's template, and for each handler its methods. A key that is limited to a part of the
    mesh may use all of these routes: its limits hold for each request of its batches."""
    files, batches = FileRoutes(store), BatchRoutes(store)
    return {
        "/v1/files": ((_GET, files.list_files), (_POST, files.create)),
        "/v1/files/{file}": ((_GET, files.file), (_DELETE, files.delete)),
        "/v1/batches": ((_GET, batches.list_batches), (_POST, batches.create)),
        "/v1/batches/{batch}": ((_GET, batches.batch), (_POST, batches.cancel)),
    }

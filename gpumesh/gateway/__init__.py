"""The one endpoint: an HTTP server over a mesh, in the dialects that clients speak. Which node answers is not decided
here."""

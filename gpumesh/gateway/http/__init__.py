"""An HTTP/1.1 server. It knows nothing of models, meshes or nodes."""

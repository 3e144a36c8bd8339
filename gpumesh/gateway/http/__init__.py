"""An HTTP/1.1 server: connections, requests, answers, and the limits on what clients can hold.

The server knows nothing of models, meshes or nodes. A handler, given from outside, answers the requests and records
them. Some errors belong to no request: ``Server(render_error=…)`` renders their answers. The modules here must not
import anything from the gateway's other packages.
"""

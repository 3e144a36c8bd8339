"""An HTTP/1.1 server: connections, requests, answers, and the bounds on what clients can hold.

It knows nothing of models, meshes or nodes. A handler answers the requests; how an error looks that belongs to no
request is given from outside (``Server(render_error=…)``), and so is what is recorded. Nothing of the other rooms of
the gateway may be imported here.
"""

"""What is asked of a node seldom, because it costs more than a probe every two seconds: each route to its server by
itself, and the free disk space. At regular intervals while a mesh runs, and at once for `gpumesh audit`."""

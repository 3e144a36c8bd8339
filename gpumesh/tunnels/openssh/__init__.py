"""Transport ``openssh``: the system's ``ssh`` as a child of the worker."""

"""Commands on a host: what is run, in which shell, and how the text that comes back is cleaned."""

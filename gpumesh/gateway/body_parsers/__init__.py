"""Reads and replaces the few members of a client's body that the gateway must know, in JSON and in forms. Pure."""

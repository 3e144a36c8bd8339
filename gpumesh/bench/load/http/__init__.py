"""Sends requests over HTTP in the APIs of the servers, and keeps the answers as they arrive."""

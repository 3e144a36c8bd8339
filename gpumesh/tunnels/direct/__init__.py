"""Nodes without SSH: their URLs are used as they are. Also whether a node's server runs on this machine."""

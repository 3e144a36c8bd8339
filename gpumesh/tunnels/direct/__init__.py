"""Nodes without SSH: their URLs are used as they are. A node's commands run here if its server is on this machine."""

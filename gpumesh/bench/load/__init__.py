"""Sends the requests of a stage and records each outcome."""

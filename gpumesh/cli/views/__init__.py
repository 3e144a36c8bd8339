"""Draws on a terminal: tables, bars, the live table. Views decide nothing for a command, and ask no host."""

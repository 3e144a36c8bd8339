"""Compares two results: may they be compared, which figures differ, and is a figure worse than a limit. Pure.

``compared_figures`` lists the figures, ``estimates`` gives each its uncertainty, ``significance`` decides over all of
them together. ``unlike`` finds what forbids a comparison, ``gate`` decides for CI.
"""

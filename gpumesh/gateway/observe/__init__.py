"""Observes requests: a record of each request, the access log, the metrics. Nothing here changes an answer."""

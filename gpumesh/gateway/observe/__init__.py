"""What is recorded of requests: a record of each, the access log, the metrics. Nothing here changes an answer."""

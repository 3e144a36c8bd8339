"""What is recorded of requests: the record of one, the access log, the metrics. Nothing here changes an answer."""

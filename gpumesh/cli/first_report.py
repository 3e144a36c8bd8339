"""How long commands wait for the first report of all nodes: one time for most of them, others for `init` and `demo`.

`wait_first_report` returns as soon as every node was probed or is known to be out of reach, so that only a host that
does not answer uses up the time. Then the state shows that node's facts as unknown.

Two waits do not belong to the command line, and have their own reasons: the wait of a prompt without `-m`
(daemon/sessions/local_session.py), and the wait of `audit` (mesh/inspection/fresh_inspection.py).
"""

# For `up`, `up -d`, `status`, `models` and `bench`: one connect and one probe together. With the rest of its work, a
# command then ends within the 10 s that it may take if a host does not answer.
FIRST_REPORT_TIMEOUT_S = 7.0
INIT_FIRST_REPORT_TIMEOUT_S = 12.0  # one connect, and a probe of every port that is usual for a server
# The simulated hosts of `demo` are processes that have only just started, perhaps all on one busy core.
DEMO_FIRST_REPORT_TIMEOUT_S = 15.0

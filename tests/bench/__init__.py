"""What the tunnel is worth beside what a user could take instead: `make bench`, or

    python -m tests.bench [--rounds N] [--seconds S] [--markdown FILE] [--json FILE] [ROW...]

Rows are `limited-1`, `limited-10`, ... (a link that limits each connection, against iperf3 with as many connections),
`speed` (a link that limits nothing, against haproxy and socat) and `echo` (round trip); a pattern takes several.
All of a row is measured in turn in every round, in one pair of namespaces, and a ratio compares what was measured in
the same round: the machine's load moves both sides. What is shown is the median of the rounds.
"""

"""What the tunnel is worth beside what a user could take instead: `make bench`, or

    python -m tests.bench [--rounds N] [--seconds S] [--json FILE] [--from FILE] [--readme] [ROW...]

Rows are `limited-1`, `limited-10`, ..., `limited-auto` (a link that limits each connection, against iperf3 with as many
connections); `loss-cubic`, `loss-bbr` (a link that loses packets, against one connection); and on a link that limits
nothing `direct`, `haproxy`, `socat`, `10x1`, `1000x2`, ... (stripes, workers at each end): speed, cost, memory and the
round trip of 64 bytes. There, too, are `datagrams-direct`, `datagrams-tcp-2` (kind of ports, workers), ...,
`datagrams-kcptun` and `datagrams-kcptun-tcp`: mode spray beside UDP itself, and kcptun without and with it. A pattern
takes several; without any, all are measured.
Every round measures each row once, and a ratio compares what was measured in the same round: the machine's load moves
both sides. What is shown is the median of the rounds.
"""

"""The protocol without I/O: bytes and the time go in; bytes, events and the next deadline come out.

Nothing here reads a clock, draws a random number, touches a socket or writes a log: what a function needs it is given.
The nouns, used in this sense everywhere:

- **tunnel**: a pair from the configuration, the local endpoint at one end and the target at the other. Its mode says
  what it moves: `stripe` moves TCP connections, `spray` moves UDP datagrams.
- **session**: what one client process and one server share for one tunnel, for as long as the client runs.
- **carrier**: one transport connection between the two ends; exactly one worker owns it. A **stripe** is a TCP socket
  of the kernel, a **port** a fake-TCP or UDP port. It has keys, a sequence and meters, and knows no flow.
- **flow**: one endpoint of an application; exactly one worker owns it. A **stream** is a TCP connection, that is, bytes
  in order; a **conversation** is a UDP source address, that is, datagrams. It has offsets, credit and buffers, and
  knows no carrier.
- **frame**: what a flow gives a carrier to bring across. **record**: a frame sealed, as it stands on the wire.
- **mesh**: the shared-memory rings where the worker of a flow and the worker of a carrier meet.
- **offset**: the place of a byte in its stream. **sequence**: the place of a record on its carrier.

Credit, window, in flight, reorder buffer, RTT, RTO and MSS mean what the RFCs (9293, 9000, 9002) mean by them.
"""

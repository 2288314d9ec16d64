"""`make demo`: one file, downloaded directly and through 1, 10 and 40 stripes; then by kcptun, through 1 and 10 ports.

    +------ namespace client ------+  10 Mbit/s for each connection  +------ namespace server ------+
    | curl                         |================================>| nginx, port 80               |  directly
    | curl -> forwarder            |====== one, ten, forty of =======| forwarder -> nginx           |  through stripes
    | curl -> kcptun               |============= one ===============| kcptun -> nginx              |  kcptun directly
    | curl -> kcptun -> forwarder  |============= ten ===============| forwarder -> kcptun -> nginx |  through ports
    +------------------------------+    500 Mbit/s in all, 50 ms     +------------------------------+

Signals are only noted, and every wait asks for them, so that there is no moment at which one could leave something
behind. Whatever is started has a session of its own: Ctrl-C reaches nobody but the demo, which ends the others.
"""

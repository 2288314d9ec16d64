"""Sockets, watchers and timers (gevent): where the core meets the kernel."""

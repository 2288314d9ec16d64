"""Pictures for the documentation: `python -m tests.captures` writes docs/status-*.svg and docs/top-*.svg.

What they show is real: a client and a server in two namespaces, one stripe and one spray tunnel under load, with ten
carriers of which two are worse than the others.
"""

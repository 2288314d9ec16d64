"""`forwarder doctor`: what this host offers beside what an instance needs, and what would mend the difference.

Host (reads the system)  +  Subject (a configuration, or none)
    -> checks, each a function that yields findings      examine
    -> --fix: the settings that findings carry           mend
    -> text or JSON                                      report
"""

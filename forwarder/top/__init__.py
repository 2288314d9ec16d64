"""`forwarder top`: the running instance, live in the terminal.

    asker     one question to the control socket at a time, never waiting
    meters    answers -> rates, from the differences between two, and their past
    rows      answer and rates -> the lines of the tree: tunnels, their sessions, their carriers
    model     what is looked at: cursor, order, what is expanded; keys change it
    view      model -> lines of text, as wide and as high as the terminal
    terminal  the terminal itself: modes, keys, size, signals; always given back as it was
    live      the loop around these

Only asker, terminal and live do I/O or read a clock.
"""

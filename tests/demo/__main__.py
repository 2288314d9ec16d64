"""`python -m tests.demo`."""

import sys

from tests.demo.signals import Signals

if __name__ == "__main__":
    noted = Signals()  # before anything that takes time
    from tests.demo.show import main

    sys.exit(main(noted))

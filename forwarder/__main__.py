"""`python -m forwarder` is the `forwarder` command."""

from forwarder.cli import main

if __name__ == "__main__":
    main()

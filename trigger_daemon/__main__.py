"""`python -m trigger_daemon` is the command `trigger-daemon`."""

from trigger_daemon.cli import main

if __name__ == "__main__":
    main()

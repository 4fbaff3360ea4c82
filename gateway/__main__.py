"""Run the command line: `python -m gateway`."""

import os
import signal
import sys

# No other file or socket may get the number of a closed standard stream: uvloop aborts when it closes such a one.
while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
    os.set_inheritable(descriptor, True)
os.close(descriptor)
if sys.argv[1:2] in (["serve"], ["work"]):
    # Before the imports, which take a second: the default of SIGHUP ends the process. server/signals.py handles it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would end imports and commands with a traceback

from gateway.cli.commands import run  # noqa: E402 - the signals come first

if __name__ == "__main__":
    run()

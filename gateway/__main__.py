"""Run the command line: `python -m gateway`."""

from gateway.cli.commands import run

if __name__ == "__main__":
    run()

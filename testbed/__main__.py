"""Run a private PostgreSQL and a private RabbitMQ until Ctrl-C, and print the gateway's settings for them."""

import argparse
import os
import signal
import stat
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

from testbed import RabbitMQCluster, ServerError, Servers


def main() -> None:
    """Start the servers, print the settings as a shell takes them, and wait for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="scripts/services", description=__doc__)
    parser.add_argument("--cluster", type=int, metavar="NODES", help="make RabbitMQ a cluster of this many nodes")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep data and URLs in this folder for the next run")
    options = parser.parse_args()
    if options.cluster is not None and options.cluster < 1:
        parser.error("a cluster has at least one node")
    if options.cluster is not None and options.keep is not None:
        parser.error("--keep keeps one node: leave out --cluster")
    if options.keep is not None and (closed := closed_to_others(options.keep)):
        parser.error(
            f"as root, PostgreSQL runs as `nobody`, who cannot enter {closed}: choose another folder for --keep"
        )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit())  # an orderly end, as after Ctrl-C
    for variable in ("GATEWAY_DATABASE_URL", "GATEWAY_AMQP_URL"):
        os.environ.pop(variable, None)  # pasted from an earlier run: those servers may be gone
    try:
        with suppress(KeyboardInterrupt):
            run(options.cluster, options.keep)
    except (ServerError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


def closed_to_others(folder: Path) -> Path | None:
    """Return a folder above `folder` that only its owner may enter; None if there is none, or without root."""
    above = [path for path in folder.resolve().parents if path.exists()] if os.getuid() == 0 else []
    return next((path for path in above if not path.stat().st_mode & stat.S_IXOTH), None)


def run(nodes: int | None, keep: Path | None) -> None:
    """Run the servers until a signal."""
    with ExitStack() as stack:
        if nodes is not None:
            # Servers uses the broker that the environment names.
            os.environ["GATEWAY_AMQP_URL"] = stack.enter_context(RabbitMQCluster(nodes)).url
        for name, value in stack.enter_context(Servers(keep=keep)).environment().items():
            print(f"export {name}='{value}'", flush=True)
        print("# Running until Ctrl-C or SIGTERM", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()

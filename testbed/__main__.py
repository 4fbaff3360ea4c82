"""Run a private PostgreSQL and a private RabbitMQ until Ctrl-C, and print the gateway's settings for them."""

import argparse
import os
import signal
from contextlib import ExitStack, suppress

from testbed import RabbitMQCluster, Servers


def main() -> None:
    """Start the servers, print the settings as a shell takes them, and wait for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="scripts/services", description=__doc__)
    parser.add_argument("--cluster", type=int, metavar="NODES", help="make RabbitMQ a cluster of this many nodes")
    nodes = parser.parse_args().cluster
    if nodes is not None and nodes < 1:
        parser.error("a cluster has at least one node")
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        if nodes is not None:
            # Servers uses the broker that the environment names.
            os.environ["GATEWAY_AMQP_URL"] = stack.enter_context(RabbitMQCluster(nodes)).url
        for name, value in stack.enter_context(Servers()).environment().items():
            print(f"export {name}='{value}'", flush=True)
        print("# Running until Ctrl-C or SIGTERM", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()

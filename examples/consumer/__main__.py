"""Consume until SIGTERM or Ctrl-C: `python -m examples.consumer`."""

import asyncio
import logging
import signal
import sys

from examples.consumer.consumer import Consumer, UnsupportedQueue
from examples.consumer.settings import ConfigurationError, Settings, load, unknown_variables

EXIT_UNUSABLE = 2

log = logging.getLogger(__name__)


async def consume(settings: Settings) -> None:
    """Run a consumer until SIGTERM or Ctrl-C, then log its counts."""
    consumer = Consumer(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, consumer.stop)
    await consumer.run()
    log.info(
        "%d delivered, %d repeats dropped, %d too old, %d AMQP messages dead-lettered",
        consumer.delivered,
        consumer.dropped_repeats,
        consumer.too_old,
        consumer.dead_lettered,
    )


def main() -> None:
    """Run the command; a setting that cannot be used ends it with one line and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # The consumer itself logs the state of its connection.
    for library in ("aio_pika", "aiormq"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    for variable in unknown_variables():
        log.warning("%s is no setting of the consumer; is it misspelt?", variable)
    try:
        asyncio.run(consume(load()))
    except (ConfigurationError, UnsupportedQueue) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_UNUSABLE)


if __name__ == "__main__":
    main()

"""The log of a process is written whole, and never keeps the process from ending."""

import json
import subprocess
import sys


def test_a_process_ends_although_nobody_reads_its_log() -> None:
    program = (
        "import logging, time; from gateway.telemetry import log; log.configure('INFO');"
        "[logging.info('x' * 1000) for _ in range(200)]; time.sleep(0.2)"  # three times what a pipe holds
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)  # noqa: S603 - our own program
    try:
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def test_the_last_lines_of_a_process_are_written() -> None:
    program = (
        "import logging; from gateway.telemetry import log; log.configure('INFO'); "
        "[logging.info(n) for n in range(5000)]"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30, check=True)  # noqa: S603
    assert [json.loads(line)["message"] for line in ended.stderr.splitlines()] == [str(n) for n in range(5000)]

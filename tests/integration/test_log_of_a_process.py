"""The log of a process is written whole, has all that goes to standard error, and never keeps it from ending."""

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


ERRORS_THAT_NOBODY_CATCHES = """
import threading
from gateway.telemetry import log

def fail():
    raise KeyError("a text for one reader")

class Failing:
    def __del__(self):
        fail()

async def wait(): ...

log.configure("INFO")
thread = threading.Thread(target=fail, name="background")
thread.start()
thread.join()
Failing()
wait()
fail()
"""


def test_errors_that_nobody_catches_and_warnings_are_lines_without_data() -> None:
    command = [sys.executable, "-c", ERRORS_THAT_NOBODY_CATCHES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603
    assert done.returncode == 1
    assert "for one reader" not in done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["message"].strip() for line in lines] == [
        "the thread background has ended by an unexpected error",
        "an error in Failing.__del__ was ignored",
        "<string>:19: RuntimeWarning: coroutine 'wait' was never awaited",
        "ended by an unexpected error",
    ]

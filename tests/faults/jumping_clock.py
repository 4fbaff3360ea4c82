"""The gateway with a wall clock that jumps: `python -m tests.faults.jumping_clock serve`.

Every reading of the wall clock from Python is shifted by the seconds in the file that CLOCK_OFFSET_FILE names. The
machine's own clock stays as it is, and so does the monotonic clock, which never jumps.
"""

import datetime as datetime_module
import os
import time
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

from testbed import Gateway

VARIABLE = "CLOCK_OFFSET_FILE"


class JumpingClockGateway(Gateway):
    """A gateway process whose wall clock can be moved."""

    def _environment(self) -> dict[str, str]:
        return super()._environment() | {VARIABLE: str(self._offset)}

    def _command(self) -> list[str]:
        python, *_ = super()._command()
        return [python, "-m", "tests.faults.jumping_clock", "serve"]

    def _prepare(self) -> None:
        self.jump(0)

    def jump(self, seconds: float) -> None:
        """Let the wall clock show `seconds` more than the right time."""
        fresh = self._offset.with_suffix(".new")
        fresh.write_text(str(seconds))
        fresh.replace(self._offset)

    @property
    def _offset(self) -> Path:
        return self.directory / "clock-offset"


def _install(offset_file: Path) -> None:
    right_time = time.time

    def shifted() -> float:
        return right_time() + float(offset_file.read_text())

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.fromtimestamp(shifted(), tz)

    time.time = shifted
    time.time_ns = lambda: int(shifted() * 1e9)
    datetime_module.datetime = Shifted  # type: ignore[misc]


if __name__ == "__main__":
    _install(Path(os.environ[VARIABLE]))
    # Only now: modules keep the clock that they imported.
    from gateway.cli.commands import run

    run()

"""What processes cost, from the kernel's own accounting: CPU time and peak memory, children included. Linux only.

A server is found by the port it listens on, so it does not matter who started it, or how many processes share it.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil


def busy_s() -> float:
    """CPU seconds that this machine has spent on anything, or had taken away by other virtual machines."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


class ServerProcesses:
    """All processes that listen on a local port, and everything below them."""

    def __init__(self, port: int) -> None:
        """Raises LookupError when nobody on this machine listens there."""
        listening = {
            socket.pid
            for socket in psutil.net_connections(kind="tcp")
            if socket.pid and socket.status == psutil.CONN_LISTEN and socket.laddr and socket.laddr.port == port
        }
        if not listening:
            raise LookupError(f"no process of this machine listens on port {port}")
        self._roots = [psutil.Process(pid) for pid in listening]

    def cpu_s(self) -> float:
        """CPU seconds so far, user and system; of children that have ended as well, once they have been waited for."""
        total = 0.0
        for process in self._all():
            with suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:4])  # user, system, and both of ended children
        return total

    def resident_mb(self) -> float:
        """Resident memory now, in MB."""
        return self._memory_mb("VmRSS:")

    def peak_mb(self) -> float:
        """The largest resident memory each process has had, added up, in MB."""
        return self._memory_mb("VmHWM:")

    def _all(self) -> Iterable[psutil.Process]:
        found = {process.pid: process for process in self._roots}
        for root in self._roots:
            with suppress(psutil.NoSuchProcess):
                found |= {process.pid: process for process in root.children(recursive=True)}
        return found.values()

    def _memory_mb(self, field: str) -> float:
        total_kb = 0
        for process in self._all():
            with suppress(FileNotFoundError, ProcessLookupError):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                total_kb += sum(int(line.split()[1]) for line in lines if line.startswith(field))
        return total_kb / 1000 * 1.024

"""CPU time and memory of processes and their children, from the kernel's accounting. Linux only.

A server is found by the port it listens on, whoever started it and however many processes share the port.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil


def busy_s() -> float:
    """Return the CPU seconds that this machine has spent, those taken by other virtual machines included."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


class ServerProcesses:
    """All processes that listen on a local port, and their descendants."""

    def __init__(self, port: int) -> None:
        """Find the processes. Raises LookupError when no process of this machine listens on the port."""
        listening = {
            socket.pid
            for socket in psutil.net_connections(kind="tcp")
            if socket.pid and socket.status == psutil.CONN_LISTEN and socket.laddr and socket.laddr.port == port
        }
        if not listening:
            raise LookupError(f"no process of this machine listens on port {port}")
        self._roots = [psutil.Process(pid) for pid in listening]

    def cpu_s(self) -> float:
        """Return the CPU seconds so far, user and system. Children that have ended and been waited for are included."""
        total = 0.0
        for process in self._all():
            with suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:4])  # user, system, and both of ended children
        return total

    def resident_mb(self) -> float:
        """Return the resident memory now, in MB."""
        return self._memory_mb("VmRSS:")

    def peak_mb(self) -> float:
        """Return the sum of the largest resident memory that each process has had, in MB."""
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

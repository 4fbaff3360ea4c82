"""Run one server, and end it when the process that asked for it ends.

    python supervisor.py DIRECTORY USER_ID LAST_SIGNAL COMMAND...

The client (testbed/processes.py) holds the other end of this program's standard input. Each byte that it writes is the
number of a signal for the server; SIGKILL goes to all processes below this one. When the pipe closes, the client has
ended, perhaps by a SIGKILL: the server then gets LAST_SIGNAL, later SIGKILL, and its DIRECTORY is removed, unless it
is "".

This program is a "child subreaper" (prctl(2)): it adopts every orphan below it. So processes that detach themselves, as
Erlang's epmd does, can still be paused and killed. Linux only; standard library only.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
LAST_SIGNAL_GRACE_S = 3.0  # PostgreSQL's immediate shutdown takes 0.1 s


def descendants(ancestor: int) -> dict[int, str]:
    """Return the state of every process below `ancestor`, nearest first, by pid.

    A state is a letter of proc(5), such as "S" for sleeping and "T" for stopped.
    """
    children: dict[int, list[tuple[int, str]]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                # State and parent follow the name, which is in parentheses and may contain parentheses itself.
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
            children.setdefault(int(parent), []).append((int(entry.name), state))
    found: dict[int, str] = {}
    level = children.get(ancestor, [])
    while level:
        found.update(level)
        level = [child for pid, _ in level for child in children.get(pid, [])]
    return found


def signal_descendants(number: int) -> bool:
    """Send a signal to every process below this one. Return False if there is none."""
    below = descendants(os.getpid())
    for pid in below:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return bool(below)


def kill_descendants() -> None:
    """Kill every process below this one. Repeat until none is left: a process may fork after the listing."""
    while signal_descendants(signal.SIGKILL):
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                time.sleep(0.005)
                break


def main(directory: str, user_id: int, last_signal: int, command: list[str]) -> int:
    """Run `command` as `user_id` until it ends, SIGKILL is ordered, or the client is gone. Return its exit code."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    if user_id != os.getuid():
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, user=user_id, group=user_id, extra_groups=[])
    else:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    ended = os.pidfd_open(server.pid)
    while True:
        readable, _, _ = select.select([sys.stdin, ended], [], [])
        if ended in readable:
            break
        order = os.read(sys.stdin.fileno(), 1)
        if not order:
            # A paused server handles no other signal.
            signal_descendants(signal.SIGCONT)
            server.send_signal(last_signal)
            select.select([ended], [], [], LAST_SIGNAL_GRACE_S)
            kill_descendants()
            if directory:
                shutil.rmtree(directory, ignore_errors=True)
            return 0
        if order[0] == signal.SIGKILL:
            break
        server.send_signal(order[0])
    # Reap it before kill_descendants() does, to know its exit code.
    server.poll()
    kill_descendants()
    return server.returncode or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))

"""Runs one server and outlives whoever asked for it, so that nothing is ever left running.

    python supervisor.py DIRECTORY USER_ID LAST_SIGNAL COMMAND...

The asker (testbed/servers.py) holds the other end of our standard input. Each byte it writes is the number of
a signal for the server; SIGKILL goes to everything below us. When the pipe closes without that, the asker is
gone (killed, maybe): the server gets LAST_SIGNAL, then SIGKILL, and its DIRECTORY is removed. A "child
subreaper" adopts every orphan below it, so that processes which detach themselves (Erlang's epmd does) stay
ours to pause and to kill. Linux only; standard library only.
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
    """Every process below `ancestor`: pid → state, a letter of proc(5) such as "S" sleeping, "T" stopped."""
    children: dict[int, list[tuple[int, str]]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                # What counts comes after the name, which stands in parentheses and may hold some itself.
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
    """Send a signal to every process below us; whether there was one."""
    below = descendants(os.getpid())
    for pid in below:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return bool(below)


def kill_descendants() -> None:
    """Kill until none is left: one of them may fork between the look and the kill."""
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
    """Run `command` as `user_id` until it ends, is told to, or nobody is left to tell."""
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
            signal_descendants(signal.SIGCONT)  # a paused server heeds no other signal
            server.send_signal(last_signal)
            select.select([ended], [], [], LAST_SIGNAL_GRACE_S)
            kill_descendants()
            shutil.rmtree(directory, ignore_errors=True)
            return 0
        if order[0] == signal.SIGKILL:
            break
        server.send_signal(order[0])
    server.poll()  # reap it ourselves, to know its exit code
    kill_descendants()
    return server.returncode or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))

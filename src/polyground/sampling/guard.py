"""Runs a command for as long as somebody holds our standard input open; run as a file, by any Python.

A server must not outlive the stage that started it, not even where that was killed: its end of the pipe closes all the same.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

PATIENCE = 20.0
"""Seconds that the command and its children have to end by themselves."""


def main(command: list[str]) -> int:
    """Run the command until it ends, or standard input does; its exit code, 128 and the signal for one that was killed."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603 - the caller's own command
    threading.Thread(target=_end_with_input, args=(child.pid,), daemon=True).start()
    code = child.wait()
    # What the command has left behind of its children.
    _signal(child.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _end_with_input(group: int) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    _signal(group, signal.SIGTERM)
    time.sleep(PATIENCE)
    _signal(group, signal.SIGKILL)


def _signal(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    # What ends the stage by Ctrl-C must not end the one who cleans up after it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(main(sys.argv[1:]))

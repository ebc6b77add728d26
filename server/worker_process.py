"""One worker process and the socket to it: it imports what it needs at once, and loads when it is told its settings."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

from server.child_environment import child_environment

WORKER_COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "server.worker.main")
_POLL_S = 0.01


class WorkerProcess:
    """Owns the process, and the socket until somebody takes it."""

    def __init__(self, command: Sequence[str] = WORKER_COMMAND) -> None:
        """`command` starts a worker when the number of its socket is appended."""
        self.socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=child_environment(),
                start_new_session=True,  # a Ctrl-C on the terminal is for the API process alone
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """End it at once: SIGKILL, as a stopped process takes no other signal."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self, limit_s: float) -> int | None:
        """Its exit code, None if it has none after so long."""
        clock = asyncio.get_running_loop().time
        end = clock() + limit_s
        while (code := self.exit_code) is None and clock() < end:
            await asyncio.sleep(_POLL_S)
        return code

    def leave(self) -> None:
        """Let a process be that cannot be ended now, as one that waits in the kernel; whenever it ends, it is gone."""
        threading.Thread(target=self._process.wait, name="leave a process", daemon=True).start()

    def close(self) -> None:
        """End a process that was never told anything."""
        self.socket.close()
        self.kill()
        self._process.wait()

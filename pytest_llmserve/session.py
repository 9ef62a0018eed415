"""What one pytest process keeps while it runs: settings, servers, the load lock.

Under pytest-xdist every worker has one, all sharing the folder that the controller made, so that
a server started by one worker is found by the others and ended by the controller.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_llmserve.config import Settings
    from pytest_llmserve.launch.manager import ServerManager
    from pytest_llmserve.servers import Server, ServerConfig


@dataclass
class Session:
    """The state of one pytest process; made on first use, never in a run that needs none of it.

    `run_dir` holds server logs and records of this run; `owner_pid` is the process whose end
    ends all servers (the controller).
    """

    settings: Settings
    run_dir: Path
    owner_pid: int
    _manager: ServerManager | None = field(default=None, repr=False)
    _lock: Any = field(default=None, repr=False)

    @property
    def manager(self) -> ServerManager:
        if self._manager is None:
            from pytest_llmserve.launch.manager import ServerManager

            self._manager = ServerManager(self.run_dir, self.owner_pid)
        return self._manager

    @property
    def kept(self) -> bool:
        """Whether something in `run_dir` is worth reading afterwards, such as the log of a failed
        start. Any process of the run may set it; the controller clears up."""
        return (self.run_dir / "kept").exists()

    @kept.setter
    def kept(self, kept: bool) -> None:
        mark = self.run_dir / "kept"
        mark.touch() if kept else mark.unlink(missing_ok=True)

    def serve(self, config: ServerConfig, progress: Callable[[str], None]) -> Server:
        """The running server for a config, started if it is not there yet."""
        from pytest_llmserve.engines import get_engine

        return self.manager.get(config, get_engine(config.engine), progress)

    @contextmanager
    def alone(
        self, waiting: Callable[[], AbstractContextManager[Any]]
    ) -> Generator[None, None, None]:
        """Held while a test uses servers: loads on one machine never overlap, not even those of
        two pytest runs. The same process may enter it again. `waiting` is entered while another one
        has the machine."""
        from filelock import Timeout

        if self._lock is None:
            from pytest_llmserve.launch.leases import lease

            self._lock = lease("load")
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            with waiting():
                self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def close(self) -> None:
        """End all servers of the run and remove its folder (controller only)."""
        if (self.run_dir / "servers").exists() or self._manager is not None:
            self.manager.stop_all()
        if not self.kept:
            shutil.rmtree(self.run_dir, ignore_errors=True)


def new_run_dir() -> Path:
    """A fresh private folder for one pytest run."""
    return Path(tempfile.mkdtemp(prefix="llmserve-"))

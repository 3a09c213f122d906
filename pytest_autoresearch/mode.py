"""What the modes share: they collect no tests, and an experiment has a line of its own on the terminal."""

from contextlib import nullcontext
from typing import Any

import pytest

from .settings import Settings

NAME = "autoresearch-mode"  # of the registered mode


class Mode:
    """A plugin object that takes the session over."""

    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        self.config = config
        self.settings = settings
        self._terminal: Any = None

    def say(self, line: str) -> None:
        """Write one line to the terminal, above no live line."""
        if self._terminal is not None:
            capture = self.config.pluginmanager.getplugin("capturemanager")
            with capture.global_and_fixture_disabled() if capture else nullcontext():
                self._terminal.write_line(line)
                self._terminal.flush()

    def pytest_sessionstart(self) -> None:
        """Take the terminal from pytest's line of letters: an experiment has a line of its own."""
        self._terminal = self.config.pluginmanager.getplugin("terminalreporter")
        if self._terminal is not None:
            self._terminal.showfspath = False
            self._terminal._show_progress_info = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> bool:
        """Collect no tests."""
        return True

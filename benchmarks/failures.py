"""A plugin of pytest that shows each failure when it happens, so that a run which is cut off has shown it."""

from __future__ import annotations

from typing import Any

import pytest


class _Failures:
    def __init__(self, terminal: Any):
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._terminal.write_line(f"\n{report.nodeid}\n{report.longreprtext}")
            self._terminal.flush()


@pytest.hookimpl(trylast=True)  # the terminal's reporter is made by another plugin's
def pytest_configure(config: Any) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        config.pluginmanager.register(_Failures(terminal))

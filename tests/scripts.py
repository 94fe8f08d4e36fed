"""Runs a script within the process of the tests, which saves starting Python and importing torch."""

from __future__ import annotations

import runpy
import sys
from unittest import mock

from fl_lightning.run.config import CONF


def call(name: str, *arguments: str) -> int:
    """Run ``<name>.py`` with a command line; its sentence goes to stderr as Python would send it there.

    Returns:
        The exit code.
    """
    # Hydra's handlers would outlive the test, and write to what pytest has closed by then.
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    with mock.patch.object(sys, "argv", [f"{name}.py", *arguments, *quiet]):
        try:
            runpy.run_path(str(CONF.parent / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
                return 1
            return int(end.code or 0)
    return 0

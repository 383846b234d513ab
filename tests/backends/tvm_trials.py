"""Trials that go wrong, for the tests of tuning: ``python -m tests.backends.tvm_trials`` in place of the
real one.

The variable ``TRIALS`` says how: ``crash`` ends the process at every candidate whose order is ``rows``,
``refuse`` raises at each, ``hang`` never answers one whose order is ``rows``.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from graphprune.backends import tvm_trial


def main() -> None:
    how, real = os.environ["TRIALS"], tvm_trial._built

    def built(function: Any, knobs: Any, machine: Any) -> Any:
        if how == "refuse":
            raise ValueError("no schedule today")
        if knobs.order == "rows" and how == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if knobs.order == "rows" and how == "hang":
            time.sleep(600)
        return real(function, knobs, machine)

    tvm_trial._built = built
    tvm_trial.main()


if __name__ == "__main__":
    main()

"""The package ``tvm``, imported when it is first needed, with the threads that this process may use."""

from __future__ import annotations

import os
from typing import Any

from graphprune.errors import BackendError, MissingExtraError, described
from graphprune.versions import installed


def package() -> Any:
    """The package ``tvm``.

    Raises:
        MissingExtraError: it is not installed.
        BackendError: it is, and does not import.
    """
    # Read when TVM's pool starts. Left alone, it has a thread for every second core, and where that is one it
    # binds the caller's thread to the first core, for all that the process does later.
    os.environ.setdefault("TVM_NUM_THREADS", str(cores()))
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    try:
        import tvm
    except ModuleNotFoundError as error:
        if error.name != "tvm":
            raise _broken(error) from error
        raise MissingExtraError("apache-tvm", "tvm", "backend='tvm'") from error
    except Exception as error:  # a library that is not there, a tvm-ffi of another version …
        raise _broken(error) from error
    if tvm.__file__ is None:  # a folder of that name somewhere on sys.path
        raise MissingExtraError("apache-tvm", "tvm", "backend='tvm'")
    return tvm


def _broken(error: Exception) -> BackendError:
    found = [f"{name} {installed(name)}" for name in ("apache-tvm", "apache-tvm-ffi") if installed(name)]
    here = f"; installed: {', '.join(found)}" if found else ""
    return BackendError(
        f"tvm does not import ({described(error)}{here}); "
        "pip install 'graphprune[tvm]' brings what fits together"
    )


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

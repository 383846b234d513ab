"""Where what was measured or tuned on this machine is kept between runs.

``$GRAPHPRUNE_CACHE``, else ``$XDG_CACHE_HOME/graphprune``, else ``~/.cache/graphprune``. Everything in it can
be made again, so it may be removed at any time.

>>> directory("latency").name
'latency'
"""

from __future__ import annotations

import os
from pathlib import Path


def directory(*parts: str) -> Path:
    """The cache directory, or one below it; it need not exist."""
    own = os.environ.get("GRAPHPRUNE_CACHE")
    if own:
        return Path(own).expanduser().joinpath(*parts)
    shared = os.environ.get("XDG_CACHE_HOME")
    base = Path(shared).expanduser() if shared else Path.home() / ".cache"
    return base.joinpath("graphprune", *parts)

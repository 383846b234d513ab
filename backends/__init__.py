"""One file a runtime (with its parts beside it); :mod:`graphprune.backend` is the contract.

Loaded by name through :data:`graphprune.registry.backends`, never imported by the compiler itself.
"""

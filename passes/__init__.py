"""The passes, one file each; they load when first named (see :mod:`graphprune.registry`)."""

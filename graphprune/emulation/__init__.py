"""Running artifacts for aarch64 on a host that is not: qemu's user mode, set up in a folder.

:mod:`.install` sets it up, from Debian's packages (:mod:`.debian`) and wheels (:mod:`.wheels`);
:mod:`.emulator` runs a program; :mod:`.machine` runs an artifact, with :mod:`.guest` on the other side. What
runs there is proven to compute the right thing. How fast it is there says nothing, and nobody measures it.

>>> from graphprune.emulation.emulator import Processor, overlay
>>> Processor("cortex-a72", "0xd08", "fp asimd").model
'cortex-a72'
"""

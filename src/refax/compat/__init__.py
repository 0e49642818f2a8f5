"""Code that was written for Flax NNX, on Refax.

    from refax.compat import nnx        # in place of: from flax import nnx

has every public name of Flax NNX 0.12, its modules too, and starts in lojax mode, as Flax does:
Variables hold arrays, and `jax.grad(loss)(model)` or `jax.tree.map` over a model work as they were
written. `nnx.use_hijax(True)` turns Refs on. Code that cannot be changed runs unchanged:

    python -m refax.compat script.py    # `flax.nnx` is Refax in this process
"""

from refax.compat import nnx
from refax.compat.install import install_as_flax

__all__ = ["install_as_flax", "nnx"]

"""uta-jax: Unmasked Token Alignment of vision transformers with a frozen CLIP teacher, in JAX/Flax.

Importing the package imports neither JAX, PyTorch nor TensorFlow.

Shape letters, used as suffixes of array names throughout (``target_bke`` is [b, k, e]):

    b  batch                n  patch tokens (the whole grid)      k  kept patch tokens
    d  student width        t  teacher width                      e  joint embedding
    h w c  image            l  text length                        g  side of the patch grid
    p  values of one patch (side * side * 3)
"""

import glob
import os

__version__ = "0.1.0"


class UserError(ValueError):
    """A mistake the user can mend: one line naming the key, the value and the fix.

    The command line prints the line alone, without a traceback, and exits with ``exit_code``; the
    README lists those of the subclasses.
    """

    exit_code = 2


def quiet_tpu_library() -> None:
    """Where libtpu is installed and no TPU is: answer what it would ask for, and complain of.

    Before JAX looks for devices, which loads the library if it is there.
    """
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")

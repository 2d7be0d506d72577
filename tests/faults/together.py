"""A run of which nothing is left but what ties its processes: each turn waits for all of them.

The argument is the keywords of ``processes.started`` as JSON.
"""

import json
import sys

import jax
import numpy as np

from uta_jax import faults, processes


def main() -> None:
    """A thousand sums over all devices, with the point ``step`` after each."""
    with processes.started("cpu", **json.loads(sys.argv[1])):
        mesh = jax.make_mesh((jax.device_count(),), ("all",))
        split, whole = (
            jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("all",), ())
        )
        one = np.ones(jax.local_device_count(), np.float32)
        ones = jax.make_array_from_process_local_data(split, one)
        add = jax.jit(lambda x: x.sum(), out_shardings=whole)
        for _ in range(1000):
            if float(add(ones)) != jax.device_count():
                raise RuntimeError("a wrong sum")
            faults.reach("step")
    print("DONE", flush=True)


if __name__ == "__main__":
    main()

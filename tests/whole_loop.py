"""One process's part of a whole run: train, evaluate, export, all within one start.

    python whole_loop.py CONFIG WORKDIR [--config.KEY=VALUE ...]

The last line that it prints is what it was told of the figures.
"""

import json
import sys
from pathlib import Path

from uta_jax import processes, publish
from uta_jax.config_files import read_config
from uta_jax.evals import evaluate
from uta_jax.train import train


def main(path: str, workdir: str, *overrides: str) -> None:
    """As the commands of the same names."""
    config = read_config(path, list(overrides))
    with processes.started(config.platform, **config.processes):
        trained = train(config, workdir)
        found = evaluate(workdir)
        publish.export_run(workdir, "hf", Path(workdir) / "exported")
        processes.gather("written", None)
    print(json.dumps({"trained": trained, "found": found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

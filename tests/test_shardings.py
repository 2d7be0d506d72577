"""The layout of every array of the paper's recipes, as committed: a change shows in a diff.

``python tests/test_shardings.py`` writes the table anew.
"""

from pathlib import Path

import jax

from uta_jax import mesh
from uta_jax.config import make_recipe
from uta_jax.config_files import read_config
from uta_jax.models.presets import CLIP
from uta_jax.models.vit import init_vit
from uta_jax.step import state_shapes

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "shardings.txt"
RECIPES = ("uta_b16", "uta_l14", "uta_g14")
KEYS = ["data.path=x", "optim.ema_decay=0.9", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]


def table() -> str:
    """Path, shape and layout of each array of the state and of the teacher; nothing is computed."""
    lines, devices = [], mesh.make_mesh(2, 2, 2, devices=jax.devices()[:8])
    for name in RECIPES:
        overrides = [f"--config.{key}" for key in KEYS]
        config = read_config(str(ROOT / "configs" / f"{name}.py"), overrides)
        recipe = make_recipe(config, CLIP["eva01_g14_plus"], 14_197_122, devices=8)
        vision = recipe.task.teacher.vision
        teacher = jax.eval_shape(lambda vision=vision: init_vit(vision, jax.random.key(0)))
        state = state_shapes(recipe)
        trees = {"params": state.params, "moments": state.opt_state, "average": state.ema}
        trees |= {"teacher": {"vision": teacher}}
        shardings = mesh.shardings(devices, trees)
        lines.append(f"# {name}")
        for (path, leaf), sharding in zip(
            jax.tree.leaves_with_path(trees), jax.tree.leaves(shardings), strict=True
        ):
            lines.append(f"{mesh.path_name(path)} {list(leaf.shape)} {list(sharding.spec)}")
    return "\n".join(lines) + "\n"


def test_the_layouts_are_those_committed():
    assert table() == GOLDEN.read_text()


if __name__ == "__main__":
    GOLDEN.write_text(table())

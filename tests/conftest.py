"""Eight CPU devices and strict shapes for every test; small models and data that tests share."""

import os

from several import COMPILE_SOON, DEVICES

# Before JAX starts: the sharding tests need more devices than a laptop has.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        COMPILE_SOON,
        DEVICES.format(8),
        # On a busy machine eight devices on two cores may need more than the usual 40 s to meet.
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
    )
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Threads of XLA's pool: a device waiting in a collective holds one, and its peers need others.
os.environ["NPROC"] = "32"
# Programs in flight on devices that share threads can wait for each other: processes.settle.
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


# Of the files that `make test` runs; begun first, so that no worker is left with one at the end.
LONGEST = ("test_train", "test_step", "test_data_loader_kinds", "test_plan", "test_objectives")


def pytest_collection_modifyitems(items):
    """The longest files first; the others as they were."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """A worker would end with gigabytes of them."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """Many tests train the same little model: compile its step once a session."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A small emoji_scenes data set: 256 scenes to train on, 128 to evaluate."""
    from uta_jax.data import emoji_scenes

    out = tmp_path_factory.mktemp("data") / "emoji_scenes"
    emoji_scenes.build(out, train=256, val_single=128, val_scenes=32, processes=1, progress=False)
    return out


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory):
    """The tiny CLIP with random weights, as a Hugging Face directory."""
    from uta_jax.interop.export import export
    from uta_jax.models.presets import CLIP
    from uta_jax.models.text import init_text
    from uta_jax.models.vit import init_vit

    spec, key = CLIP["tiny_clip"], jax.random.key(0)
    params = {
        "vision": jax.jit(lambda: init_vit(spec.vision, key))(),
        "text": jax.jit(lambda: init_text(spec.text, key))(),
        "logit_scale": np.float32(2.66),
    }
    out = tmp_path_factory.mktemp("teacher") / "tiny_clip"
    export(jax.tree.map(np.asarray, params), spec, "hf", out, {})
    return out

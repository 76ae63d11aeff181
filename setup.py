"""Packaging of dppo_mcore and its kernels; versions are held by `constraints/`."""

from setuptools import find_packages, setup

BASE = [
    "torch>=2.9",
    "megatron-core==0.16.1",
    "transformers>=5.0",
    "triton>=3.6",
    "nvidia-dali-cuda130>=2.4",
    "av>=15",
    "safetensors",
    "numpy",
    "psutil",
    "pyyaml",
    "tyro>=1.0",
    "jinja2",
    "pillow",
    "tensorboard",
]
EXTRAS = {
    "gpu": ["transformer-engine[pytorch]>=2.6"],
    "report": ["pyarrow"],
    "dev": [
        "pytest>=8",
        "hypothesis",
        "ruff",
        "mypy",
        "types-PyYAML",
        "import-linter",
        "trl>=1.0",
    ],
}

setup(
    name="dppo_mcore",
    version="0.1.0",
    description="Deliberate Practice Policy Optimization for Qwen2.5-VL on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["dppo_mcore", "dppo_mcore.*"]), "dppo_kernels"],
    package_dir={"dppo_kernels": "kernels/dppo_kernels"},
    package_data={"dppo_mcore": ["**/*.yaml", "**/*.html", "**/*.css", "**/*.js", "**/*.jinja"]},
    install_requires=BASE,
    extras_require=EXTRAS,
)

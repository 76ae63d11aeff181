"""What a container image brings and nothing may replace, as lines of a pip constraints file on stdout."""

from __future__ import annotations

import importlib.metadata
import sys

KEPT = ("torch", "torchvision", "triton", "pytorch-triton", "transformer-engine", "apex", "flash-attn", "numpy")


def pins() -> list[str]:
    """`name==version` of each of these packages that is installed."""
    found = []
    for name in KEPT:
        try:
            found.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Command line."""
    lines = pins()
    if not any(line.startswith("torch==") for line in lines):
        sys.exit("error: this Python has no torch, so it is not an NGC PyTorch image's; use `make setup`")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

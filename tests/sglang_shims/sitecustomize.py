"""Test only: lets SGLang's environment import a CUDA-linked torchvision beside a CPU torch.

torchvision's import registers meta kernels for two operators of its compiled library. Declaring their schemas first is
enough, since nothing on the way of token ids and embeddings calls them. Pinned to sglang 0.5.23 and its torchvision.
"""

import importlib.abc
import sys


class _DeclareOperators(importlib.abc.MetaPathFinder):
    """Declares the schemas once, just before torchvision is imported."""

    library = None

    def find_spec(self, name, path=None, target=None):
        """Never finds anything; acts on the first import of torchvision."""
        if name == "torchvision" and self.library is None:
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            type(self).library = library
        return None


sys.meta_path.insert(0, _DeclareOperators())

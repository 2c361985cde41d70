"""Make torchvision importable beside a torch without CUDA, in the environment this is run by: what vLLM on a CPU needs.

torchvision's public wheel registers kernels of two operators whose schemas only its own CUDA library defines. They are defined
here, just before torchvision is imported, by a hook that Python runs at its start. Nothing calls them on a CPU.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

NAME = "torchvision_schemas"

HOOK = '''\
"""Defines what torchvision's kernels are registered for, at the moment torchvision is imported; see scripts/vllm_cpu_hook.py."""
import sys


class Schemas:
    library = None

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(cls)
            import torch

            # It must live as long as the process.
            cls.library = torch.library.Library("torchvision", "FRAGMENT")
            cls.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            cls.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, Schemas)
'''


def main() -> None:
    packages = Path(sysconfig.get_paths()["purelib"])
    (packages / f"{NAME}.py").write_text(HOOK, encoding="utf-8")
    (packages / f"{NAME}.pth").write_text(f"import {NAME}\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Weights on their way to files: put together where processes share them out, and written by libraries that have names of their
own for a full disk; here it becomes one of ours."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from polyground.errors import StorageError

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_WORDS = ("no space left", "quota exceeded", "file too large", "read-only file system", "input/output error", "os error")
_OF_TORCH = ("pytorchstreamwriter", "inline_container", "iostream error", "basic_ios")
"""What torch says when a file takes no more: a RuntimeError without a number."""


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, by name, in host memory; of several processes all must ask for it."""
    return {name: whole(parameter.detach()) for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all processes, which must all ask for it, in host memory."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Raises StorageError, in place of what torch, safetensors or the system raise, where weights cannot be written."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_of_the_disk(error):
            raise
        said = " ".join(str(error).split())[:200]
        raise StorageError(
            f"{folder}: cannot be written ({said}); is the disk full? Free some space and run the same command again: it "
            "continues where it stopped"
        ) from error


def _is_of_the_disk(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _OF_THE_DISK
    # Without a number: safetensors, torch, and shutil where several files failed.
    return any(word in str(error).lower() for word in (_OF_TORCH if isinstance(error, RuntimeError) else _WORDS))

"""Weights that lie beside a network's own file: those of what was built around it."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["load_beside"]


def load_beside(module: nn.Module, tensors: dict[str, Tensor], *apart: str) -> None:
    """Load the weights of a module but those that lie in files of their own, as those of the network inside it.

    Args:
        module: to load into.
        tensors: by name.
        apart: how the names of the others begin.

    Raises:
        ValueError: some are missing, too many or of another shape.
    """
    try:
        missing, unexpected = module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # torch's, for weights of another shape
        raise ValueError(str(error).splitlines()[-1].strip()) from error
    missing = [name for name in missing if not name.startswith(apart)]
    if missing or unexpected:
        raise ValueError(f"the weights {', '.join([*missing, *unexpected][:3])} are missing or too many")

"""A module's parameters as a flat table: path -> shape, dtype, logical axes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from flax import nnx

from ryzanstein_jax.model.quantization import array_bytes


@dataclass(frozen=True)
class ParamSpec:
    """One parameter.

    Attributes:
        shape: with the padding of its mesh width.
        dtype: of its values on the devices.
        axes: logical axis of each dimension, None where it is never sharded.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str | None, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole parameter, over all devices together."""
        return array_bytes(self.shape, self.dtype)


def param_specs(module: nnx.Module) -> dict[str, ParamSpec]:
    """Dotted path -> `ParamSpec` of every parameter of a module, abstract or not, in a fixed order."""
    _, state = nnx.split(module)
    specs = {}
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        axes = variable.get_metadata().get("axes") or (None,) * len(value.shape)
        specs[".".join(str(part) for part in path)] = ParamSpec(tuple(value.shape), np.dtype(value.dtype), tuple(axes))
    return specs

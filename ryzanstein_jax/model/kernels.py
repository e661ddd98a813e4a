"""Kernels as parameters, and their products, in the precision that their scheme says.

Kernels are stored [output..., input...], as checkpoints store them. Array names end in their dims: T tokens, I inputs,
O outputs, E experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ryzanstein_jax.model import fp8, grouped, int8
from ryzanstein_jax.model.activations import gated
from ryzanstein_jax.model.quantization import Scheme

_DTYPES = {"int8": jnp.int8, "int4": jnp.int4, "fp8": fp8.FLOAT8}


def param(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype) -> nnx.Param:
    """An abstract parameter: shape, dtype and logical axes, without values."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes)


def kernel_params(
    shape: tuple[int, ...], axes: tuple[str, ...], num_inputs: int, dtype: jnp.dtype, scheme: Scheme | None,
    width: int = 1,
) -> tuple[nnx.Param, nnx.Param | None, nnx.Param | None]:  # fmt: skip
    """A kernel, and where it is quantized the float32 scales and, if its scheme has them, int8 zero points.

    Outputs are all dimensions but the last `num_inputs`. Scales are of outputs, or of groups along the last dimension
    too, which then is the kernel's last axis with `_groups` appended. Their path is the kernel's with `_scale`
    appended, that of zero points with `_zero`: loading goes by that.

    Args:
        width: devices that the last dimension is cut for; 1 where it is not.
    """
    if scheme is None:
        return param(shape, axes, dtype), None, None
    scale_shape, scale_axes = shape[:-num_inputs], axes[:-num_inputs]
    if scheme.group:
        groups = shape[-1] // scheme.held_group(shape[-1] // width)
        scale_shape, scale_axes = (*shape[:-1], groups), (*axes[:-1], f"{axes[-1]}_groups")
    zero = param(scale_shape, scale_axes, jnp.dtype("int8")) if scheme.zeros else None
    kernel = param(shape, axes, jnp.dtype(_DTYPES[scheme.kind]))
    return kernel, param(scale_shape, scale_axes, jnp.dtype("float32")), zero


def quantized_product(
    x_TI: jax.Array, kernel: jax.Array, scale: jax.Array, zero: jax.Array | None, scheme: Scheme,
    *, sharded: str | None = None, gate: str | None = None,
) -> jax.Array:  # fmt: skip
    """x W^T of a quantized kernel, float32 [T, O].

    Args:
        x_TI: activations; all dimensions but the first are inputs.
        kernel: [output..., input...], as many values in the inputs as those of a token.
        scale, zero: as `kernel_params` makes them.
        scheme: of the kernel.
        sharded, gate: as `layers.product` takes them; inputs are not sharded.
    """
    x_TI = x_TI.reshape(x_TI.shape[0], -1)
    inputs = x_TI.shape[1]
    kernel_OI = kernel.reshape(-1, inputs)
    outputs = kernel_OI.shape[0]
    if scheme.kind == "int8":
        return int8.product(x_TI, kernel_OI, scale.reshape(outputs), scheme.digits, sharded=sharded, gate=gate)
    if scheme.kind == "fp8" and not scheme.group:
        y = fp8.product(x_TI, kernel_OI, scale.reshape(outputs))
    else:
        shape = (outputs, -1) if scheme.group else (outputs,)
        y = grouped.product(x_TI, kernel_OI, scale.reshape(shape), zero if zero is None else zero.reshape(shape))
    return gated(y, gate) if gate else y


def experts_product(
    x_TI: jax.Array, kernel_EOI: jax.Array, scale: jax.Array | None, zero: jax.Array | None, scheme: Scheme | None
) -> jax.Array:
    """x W^T for each expert, [E, T, O] in the activations' dtype.

    Args:
        x_TI: activations of all experts [T, I], or of each [E, T, I].
        kernel_EOI: [E, O, I].
        scale, zero: [E, O] or [E, O, G]; None as the scheme is, or has none.
        scheme: of the kernel.
    """
    formula = "eti,eoi->eto" if x_TI.ndim == 3 else "ti,eoi->eto"
    if scheme is None or scale is None:
        return jnp.einsum(formula, x_TI, kernel_EOI)
    if scheme.kind != "int8":
        return jnp.einsum(formula, x_TI, grouped.dequantized(kernel_EOI, scale, zero, x_TI.dtype))
    q, steps = int8.quantize_tokens(x_TI, scheme.digits)
    y_ETO = jnp.einsum(formula, q, kernel_EOI, preferred_element_type=jnp.int32)
    return int8.scaled(y_ETO, scheme.digits, steps, scale[:, None]).astype(x_TI.dtype)

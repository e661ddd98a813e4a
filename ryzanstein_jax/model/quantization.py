"""Which kernels are computed in fewer bits, as data. No JAX here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ryzanstein_jax.errors import UnsupportedModelError

#: The linear layers of attention and MLP, the experts' too.
LINEAR = ("qkv", "out", "gate_up", "down")


@dataclass(frozen=True)
class Quantization:
    """One way of computing in fewer bits.

    Attributes:
        name: "int8": kernels int8 with one scale for each output channel, activations int8 with one scale for each
            token, found when they are there; products accumulate in int32. Both symmetric.
        roles: of the kernels that are: "qkv", "out", "gate_up", "down", "embedding" (and with it the output
            projection where the two are tied), "unembed". All else stays in the dtype of the activations.
        fine: those of them whose activations take two int8 digits, the second for what the first leaves: more than
            one digit can show varies within a token there. It doubles the rows of that product, not its weights.
    """

    name: str
    roles: tuple[str, ...]
    fine: tuple[str, ...] = ()

    @property
    def digits(self) -> dict[str, int]:
        """Role -> digits of its activations."""
        return {role: 2 if role in self.fine else 1 for role in self.roles}


#: What `EngineConfig.quantization` stands for. Which kernels take part was decided by measurement:
#: docs/quantization.md.
QUANTIZATIONS = {
    "int8": Quantization(
        "int8", (*LINEAR, "embedding", "unembed"), fine=("qkv", "gate_up", "down", "embedding", "unembed")
    )
}

#: Of the snapshots of this package; the format of others is read from what they say.
OWN_METHOD = "ryzanstein_jax"


def quantization_config(quantization: Quantization) -> dict[str, object]:
    """What `config.json` of a snapshot says of its weights."""
    return {
        "quant_method": OWN_METHOD, "name": quantization.name, "roles": list(quantization.roles),
        "fine": list(quantization.fine),
    }  # fmt: skip


def resolve_quantization(name: str | None, stated: object) -> Quantization | None:
    """How a model is computed.

    Args:
        name: that was asked for, of `QUANTIZATIONS`, or None: as the checkpoint is.
        stated: its `quantization_config`, or None.

    Raises:
        UnsupportedModelError: its weights are something else than what is read here.
    """
    found = None if stated is None else _of_checkpoint(stated)
    return QUANTIZATIONS[name] if name is not None else found


def _of_checkpoint(value: object) -> Quantization:
    if isinstance(value, Mapping) and value.get("quant_method") == OWN_METHOD:
        known = QUANTIZATIONS.get(str(value.get("name")))
        roles, fine = value.get("roles"), value.get("fine")
        if (
            known is not None
            and isinstance(roles, list)
            and isinstance(fine, list)
            and (set(map(str, fine)) <= set(map(str, roles)) <= set(known.roles))
        ):
            return Quantization(known.name, tuple(map(str, roles)), tuple(map(str, fine)))
    elif isinstance(value, Mapping) and value.get("quant_method") == "compressed-tensors":
        return _compressed_tensors(value)
    raise _unsupported(value)


def _compressed_tensors(value: Mapping[str, Any]) -> Quantization:
    """W8A8 as llm-compressor writes it: every linear layer but the output projection, or that one too."""
    groups, ignored = value.get("config_groups"), value.get("ignore") or []
    if value.get("format") not in ("int-quantized", None) or not isinstance(groups, Mapping) or len(groups) != 1:
        raise _unsupported(value)
    (group,) = groups.values()
    if not isinstance(group, Mapping) or group.get("targets") != ["Linear"] or not isinstance(ignored, list):
        raise _unsupported(value)
    weights, inputs = group.get("weights"), group.get("input_activations")
    rest = ("output_activations",)
    if (
        not _is_int8(weights, strategy="channel", dynamic=False)
        or not _is_int8(inputs, strategy="token", dynamic=True)
        or any(group.get(name) is not None for name in rest)
        or value.get("kv_cache_scheme") is not None
        or not set(map(str, ignored)) <= {"lm_head"}
    ):
        raise _unsupported(value)
    return Quantization("int8", LINEAR if "lm_head" in ignored else (*LINEAR, "unembed"))


def _is_int8(scheme: object, *, strategy: str, dynamic: bool) -> bool:
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": dynamic}
    return isinstance(scheme, Mapping) and all(scheme.get(name) == wish for name, wish in wanted.items())


def _unsupported(value: object) -> UnsupportedModelError:
    text = repr(value)
    return UnsupportedModelError(
        f"config.json has quantization_config={text if len(text) <= 80 else text[:77] + '...'}: this kind of quantized "
        "checkpoint is not read. Known: compressed-tensors int-quantized (8-bit channel weights, dynamic 8-bit token "
        'activations). Take the model in float32, bfloat16 or float16, and quantization="int8" if you like'
    )

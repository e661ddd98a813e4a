"""What one step moves and computes on a device, and how long that takes at best: a roofline for each of its parts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ryzanstein_jax.communication import Collective
from ryzanstein_jax.model.sizes import PaddedSizes, vector_bytes
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.planner.devices import Costs, Device
from ryzanstein_jax.planner.links import seconds as link_seconds

#: Positions that the engine's attention reads at a time (`attention.BLOCK`, which needs JAX).
BLOCK = 128


@dataclass(frozen=True)
class Step:
    """A step as the engine makes them: decodes, and one prompt chunk beside them.

    Attributes:
        decodes: sequences that get one token each.
        context: tokens that each of them attends to, its own included.
        prefill: prompt tokens of the chunk.
        before: tokens of that prompt that are in the cache already.
    """

    decodes: int = 0
    context: int = 0
    prefill: int = 0
    before: int = 0

    @property
    def tokens(self) -> int:
        return self.decodes + self.prefill

    @property
    def rows(self) -> int:
        """Rows whose logits are computed: each decode's, and the chunk's last."""
        return self.decodes + (1 if self.prefill else 0)


@dataclass(frozen=True)
class Part:
    """What one part of a step needs of one device: bytes of memory traffic and operations of matrix products."""

    bytes: float
    operations: float


@dataclass(frozen=True)
class StepTime:
    """Where the time of a step goes, in seconds.

    Attributes:
        weights: matrix products that wait for their weights.
        compute: matrix products and attention that wait for arithmetic.
        kv: attention that waits for the KV cache.
        communication: collectives, during which the device does nothing else.
        host: what the host needs for the step.
        other: what a measured device takes beyond all that: norms, rotations, the engine's own attention.
        beside: whether the host works beside the device, and not on its cores.
    """

    weights: float
    compute: float
    kv: float
    communication: float
    host: float
    other: float = 0.0
    beside: bool = True

    @property
    def device(self) -> float:
        return self.weights + self.compute + self.kv + self.communication + self.other

    @property
    def total(self) -> float:
        """The step: the device's time, or the host's if that is longer; both, where they share the cores."""
        return max(self.device, self.host) if self.beside else self.device + self.host

    @property
    def communication_share(self) -> float:
        return self.communication / self.total

    @property
    def limit(self) -> str:
        """What to make faster first: "weights", "compute", "kv", "communication", "other" or "host"."""
        parts = {name: getattr(self, name) for name in ("weights", "compute", "kv", "communication", "other")}
        if self.host > (self.device if self.beside else max(parts.values())):
            return "host"
        return max(parts, key=parts.__getitem__)


def cached_itemsize(kv_cache_dtype: str, itemsize: int) -> int:
    """Bytes of a cached number beside activations of `itemsize` bytes."""
    return itemsize if kv_cache_dtype == "auto" else 1


def step_parts(
    spec: ModelSpec, sizes: PaddedSizes, step: Step, itemsize: int, kv_cache_dtype: str = "auto"
) -> dict[str, Part]:
    """What a step needs of one device, by part: "linear" (all layers' products), "attention", "head".

    Args:
        spec, sizes: the model, padded for its width; quantized weights count as they are stored.
        step: what is computed.
        itemsize: bytes of an activation, and of a weight that is not quantized.
        kv_cache_dtype: of `config.KV_CACHE_DTYPES`.
    """
    width, heads = sizes.width, sizes.heads
    slots, embed = heads.num_slots // width, spec.hidden_size
    vocab = sizes.vocab // width
    tables = {
        role: spec.kernel_bytes(itemsize, role, vocab, embed)
        for role in (("embedding",) if spec.tie_embeddings else ("embedding", "unembed"))
    }
    # Without the tables and the last norm.
    layers = sizes.parameters_per_device(spec) - len(tables) * vocab * embed - embed
    weights = sizes.weight_bytes_per_device(spec, itemsize) - sum(tables.values()) - itemsize * embed
    moved = weights + itemsize * step.tokens * embed + _activation_bytes(spec, sizes, step, itemsize)
    linear = Part(moved, 2.0 * step.tokens * layers)

    vector = vector_bytes(spec.head_dim, cached_itemsize(kv_cache_dtype, itemsize))
    kv_bytes = attended = 0.0
    for layer in spec.layers:
        context = min(step.context, layer.window or step.context)
        # Prompt token i of the chunk attends to all before it and itself; a window cuts that.
        keys = step.before + step.prefill
        mean = step.before + (step.prefill + 1) / 2
        if layer.window is not None:
            keys, mean = min(keys, layer.window + step.prefill), min(mean, layer.window)
        kv_bytes += 2 * slots * vector * (step.decodes * context + keys + step.tokens)
        attended += step.decodes * context + step.prefill * mean
    queries = slots * heads.queries_per_slot
    attention = Part(kv_bytes, 4.0 * attended * queries * spec.head_dim)

    logits = 4 * step.rows * (vocab + 3 * sizes.vocab)  # written in float32, gathered, read by the sampler
    projection = tables["embedding" if spec.tie_embeddings else "unembed"]
    head = Part(projection * bool(step.rows) + logits, 2.0 * step.rows * vocab * embed)
    return {"linear": linear, "attention": attention, "head": head}


def _activation_bytes(spec: ModelSpec, sizes: PaddedSizes, step: Step, itemsize: int) -> float:
    """Each layer reads and writes the residual stream about eight times, and what lies between its products twice."""
    width, heads = sizes.width, sizes.heads
    inner = 2 * sizes.ffn // width * 3 + 2 * heads.num_slots // width * (heads.queries_per_slot + 2) * spec.head_dim
    return float(itemsize * step.tokens * spec.num_layers * (8 * spec.hidden_size + inner))


def cost_units(spec: ModelSpec, sizes: PaddedSizes, step: Step, itemsize: int) -> Costs:
    """How much of each of the `Costs` a step has: layers, bytes of activations, operations, bytes of cache.

    The cache counts as it is computed with: what fewer bits spare of memory is none of these costs.
    """
    slots = sizes.heads.num_slots // sizes.width
    cache = operations = 0.0
    for layer in spec.layers:
        context, keys = step.context, step.before + (step.prefill + BLOCK) / 2
        if layer.window is not None:
            context, keys = min(context, layer.window), min(keys, layer.window)
        cache += 2 * itemsize * slots * spec.head_dim * step.decodes * -(-context // BLOCK) * BLOCK
        operations += 4.0 * step.prefill * keys * slots * sizes.heads.queries_per_slot * spec.head_dim
    return Costs(spec.num_layers, _activation_bytes(spec, sizes, step, itemsize), operations, cache)


def step_collectives(spec: ModelSpec, sizes: PaddedSizes, step: Step, itemsize: int) -> list[Collective]:
    """What the engine's forward communicates, as its compiled program shows it; see `sampler_collectives`.

    Args:
        sizes: of the width and the way to shard.
        step: the tokens of a bucket: padding is sent too.
    """
    width, layers = sizes.width, spec.num_layers
    if width == 1:
        return []
    hidden = step.tokens * spec.hidden_size * itemsize
    if sizes.sharding == "sequence" and step.tokens % width == 0:
        found = [
            Collective("reduce-scatter", hidden // width, width, 2 * layers + 1),
            Collective("all-gather", hidden, width, 2 * layers + 1),
        ]
    elif sizes.sharding == "output":
        attended = step.tokens * sizes.heads.num_slots * sizes.heads.queries_per_slot * spec.head_dim * itemsize
        found = [
            Collective("all-reduce", hidden, width, 1),
            Collective("all-gather", hidden, width, 2 * layers),
            Collective("all-gather", attended, width, layers),
            Collective("all-gather", step.tokens * sizes.ffn * itemsize, width, layers),
        ]
    else:
        found = [Collective("all-reduce", hidden, width, 2 * layers + 1)]
    if spec.qk_norm == "all":  # OLMo-2: the sums of squares of queries and keys
        found.append(Collective("all-reduce", 2 * step.tokens * 4, width, layers))
    counts: dict[Collective, int] = {}
    for one in found:  # equal ones are counted together, as in a compiled program
        same = replace(one, count=0)
        counts[same] = counts.get(same, 0) + one.count
    return [replace(one, count=count) for one, count in counts.items()]


def sampler_collectives(sizes: PaddedSizes, rows: int) -> list[Collective]:
    """The sampler's: the logits of all rows, float32, gathered once."""
    return [] if sizes.width == 1 else [Collective("all-gather", rows * sizes.vocab * 4, sizes.width, 1)]


def predict(
    spec: ModelSpec,
    device: Device,
    step: Step,
    *,
    width: int = 1,
    dtype: str = "bfloat16",
    sharding: str = "megatron",
    kv_cache_dtype: str = "auto",
) -> StepTime:
    """Time of one step at one width.

    Args:
        spec: the model.
        device: what it runs on.
        step: what is computed.
        width: devices that share the model.
        dtype: of activations, and of weights that are not quantized: "bfloat16", "float16" or "float32". Arithmetic
            counts at its rate whatever the weights are.
        sharding: of `config.SHARDINGS`.
        kv_cache_dtype: of `config.KV_CACHE_DTYPES`.

    Raises:
        ConfigError: the device has no figures for the dtype, or the model can't be sharded so.
    """
    itemsize = 4 if dtype == "float32" else 2
    sizes = PaddedSizes.of(spec, width, sharding)
    times = {"weights": 0.0, "compute": 0.0, "kv": 0.0}
    for name, part in step_parts(spec, sizes, step, itemsize, kv_cache_dtype).items():
        rows = step.rows if name == "head" else step.tokens
        moving = part.bytes / device.bandwidth()
        computing = part.operations / device.rate(dtype, rows)
        if computing > moving:
            times["compute"] += computing
        else:
            times["kv" if name == "attention" else "weights"] += moving
    units, costs = cost_units(spec, sizes, step, itemsize), device.costs
    found = [*step_collectives(spec, sizes, step, itemsize), *sampler_collectives(sizes, step.rows)]
    return StepTime(
        **times,
        communication=sum(one.count * link_seconds(one, device.link) for one in found),
        host=device.host_seconds,
        other=sum(getattr(units, name) * getattr(costs, name) for name in ("layer", "activation", "prompt", "cache")),
        beside=device.platform != "cpu",
    )

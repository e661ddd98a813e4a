"""The one decoder of all families: what differs between them is data in `ModelSpec`.

Array names end in their dims: T tokens, D embed, K KV slots, Q query heads per slot, H head_dim,
R rows, V vocab.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from ryzanstein_jax.attention import AttentionPlan, attend
from ryzanstein_jax.kv_cache import KVCache, Pages
from ryzanstein_jax.model.layers import (
    AllHeadsRMSNorm,
    ColumnParallelLinear,
    Mlp,
    MoeMlp,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    apply_rope,
    replicate,
    rope_tables,
)
from ryzanstein_jax.model.rotation import rotate_and_store
from ryzanstein_jax.model.spec import LayerSpec, ModelSpec
from ryzanstein_jax.sharding import PaddedSizes

Rope = tuple[jax.Array, jax.Array]


class Attention(nnx.Module):
    """Grouped-query attention: qkv is one column-parallel product, out is row-parallel."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec, sizes: PaddedSizes, dtype: jnp.dtype):
        heads = sizes.heads
        slots, queries = heads.num_slots, heads.queries_per_slot
        self.qkv = ColumnParallelLinear(
            spec.hidden_size,
            (slots, queries + 2, spec.head_dim),
            ("kv_slots", "heads_per_slot", "head_dim"),
            dtype=dtype,
            bias=spec.qkv_bias,
            scheme=spec.schemes.get("qkv"),
        )
        self.out = RowParallelLinear(
            (slots, queries, spec.head_dim),
            spec.hidden_size,
            ("kv_slots", "heads_per_slot", "head_dim"),
            dtype=dtype,
            bias=spec.out_bias,
            scheme=spec.schemes.get("out"),
            sharding=sizes.sharding,
        )
        self.q_norm, self.k_norm = _qk_norms(spec, sizes, dtype)
        self.scale, self.softcap, self.window = spec.attention_scale, spec.attention_softcap, layer.window

    def __call__(
        self, x_TD: jax.Array, keys: Pages, values: Pages, plan: AttentionPlan, rope: Rope
    ) -> tuple[jax.Array, Pages, Pages]:
        qkv_TKGH = self.qkv(x_TD)
        k_TKH: jax.Array | None
        v_TKH: jax.Array | None
        if self.q_norm is None and (stored := rotate_and_store(qkv_TKGH, *rope, plan.slots_T, keys, values)):
            (q_TKQH, keys, values), k_TKH, v_TKH = stored, None, None
        else:
            q_TKQH, k_TKH, v_TKH = qkv_TKGH[:, :, :-2], qkv_TKGH[:, :, -2], qkv_TKGH[:, :, -1]
            if self.q_norm is not None and self.k_norm is not None:
                q_TKQH, k_TKH = self.q_norm(q_TKQH), self.k_norm(k_TKH)
            q_TKQH, k_TKH = apply_rope(q_TKQH, *rope), apply_rope(k_TKH, *rope)
        out_TKQH, keys, values = attend(
            q_TKQH, k_TKH, v_TKH, keys, values, plan, scale=self.scale, window=self.window, softcap=self.softcap
        )
        return self.out(out_TKQH), keys, values


def _qk_norms(
    spec: ModelSpec, sizes: PaddedSizes, dtype: jnp.dtype
) -> tuple[RMSNorm | AllHeadsRMSNorm | None, RMSNorm | AllHeadsRMSNorm | None]:
    """The norms of queries and keys before their rotation, where the family has them."""
    if spec.qk_norm is None:
        return None, None
    if spec.qk_norm == "head":
        q_norm, k_norm = (
            RMSNorm(spec.head_dim, eps=spec.norm_eps, offset=spec.norm_offset, dtype=dtype, axis="head_dim")
            for _ in range(2)
        )
        return q_norm, k_norm
    heads = sizes.heads
    return (
        AllHeadsRMSNorm(
            (heads.num_slots, heads.queries_per_slot, spec.head_dim),
            ("kv_slots", "heads_per_slot", "head_dim"),
            tuple(tuple(head >= 0 for head in row) for row in heads.query_heads),
            spec.num_heads * spec.head_dim,
            eps=spec.norm_eps,
            dtype=dtype,
        ),
        AllHeadsRMSNorm(
            (heads.num_slots, spec.head_dim),
            ("kv_slots", "head_dim"),
            heads.primary_slots,
            spec.num_kv_heads * spec.head_dim,
            eps=spec.norm_eps,
            dtype=dtype,
        ),
    )


class DecoderLayer(nnx.Module):
    """Attention and MLP, each added to the residual stream, with norms before, after or on both sides."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec, sizes: PaddedSizes, dtype: jnp.dtype):
        def norm(present: bool) -> RMSNorm | None:
            if not present:
                return None
            return RMSNorm(spec.hidden_size, eps=spec.norm_eps, offset=spec.norm_offset, dtype=dtype)

        before, after = spec.norms in ("pre", "both"), spec.norms in ("post", "both")
        self.attention_norm, self.attention_post_norm = norm(before), norm(after)
        self.attention = Attention(spec, layer, sizes, dtype)
        self.mlp_norm, self.mlp_post_norm = norm(before), norm(after)
        self.mlp: Mlp | MoeMlp
        if layer.moe:
            assert spec.moe is not None
            self.mlp = MoeMlp(
                spec.hidden_size,
                spec.moe,
                sizes.experts,
                spec.activation,
                dtype=dtype,
                schemes=spec.schemes,
                sharding=sizes.sharding,
            )
        else:
            self.mlp = Mlp(
                spec.hidden_size,
                sizes.ffn,
                spec.activation,
                dtype=dtype,
                bias=spec.mlp_bias,
                schemes=spec.schemes,
                sharding=sizes.sharding,
                width=sizes.width,
            )

    def __call__(
        self, x_TD: jax.Array, keys: Pages, values: Pages, plan: AttentionPlan, rope: Rope
    ) -> tuple[jax.Array, Pages, Pages]:
        with jax.named_scope("attention"):
            y_TD, keys, values = self.attention(replicate(_apply(self.attention_norm, x_TD)), keys, values, plan, rope)
            x_TD = x_TD + _apply(self.attention_post_norm, y_TD)
        with jax.named_scope("mlp"):
            x_TD = x_TD + _apply(self.mlp_post_norm, self.mlp(replicate(_apply(self.mlp_norm, x_TD))))
        return x_TD, keys, values


class Decoder(nnx.Module):
    """A decoder-only transformer, built abstract (see `layers.param`).

    Args:
        spec: what the model computes.
        sizes: its sizes, padded for the mesh.
        dtype: of activations, and of the parameters that are not quantized.
    """

    def __init__(self, spec: ModelSpec, sizes: PaddedSizes, dtype: jnp.dtype):
        def table(role: str) -> VocabParallelEmbedding:
            scheme = spec.schemes.get(role)
            return VocabParallelEmbedding(
                sizes.vocab, spec.hidden_size, dtype=dtype, scheme=scheme, sharding=sizes.sharding
            )

        self.embedding = table("embedding")
        self.layers = nnx.List([DecoderLayer(spec, layer, sizes, dtype) for layer in spec.layers])
        self.final_norm = RMSNorm(spec.hidden_size, eps=spec.norm_eps, offset=spec.norm_offset, dtype=dtype)
        self.unembed = None if spec.tie_embeddings else table("unembed")
        self.spec = spec

    def __call__(
        self, tokens_T: jax.Array, positions_T: jax.Array, cache: KVCache, plan: AttentionPlan
    ) -> tuple[jax.Array, KVCache]:
        """Runs the layers over T tokens.

        Args:
            tokens_T, positions_T: int32 [T].
            cache: the pages, which take the tokens' keys, values and ids.
            plan: who attends to what.

        Returns:
            The final hidden states [T, D], normalized, and the cache.
        """
        x_TD = self.embedding(tokens_T)
        if self.spec.embedding_scale != 1.0:
            # Rounded to the weights' dtype, as the published models were trained.
            x_TD = x_TD * jnp.asarray(self.spec.embedding_scale, x_TD.dtype)
        # The barrier keeps XLA from computing every cosine again in each layer, for each head.
        ropes = jax.lax.optimization_barrier([rope_tables(rope, positions_T) for rope in self.spec.ropes])
        keys, values = [], []
        for index, (module, layer) in enumerate(zip(self.layers, self.spec.layers, strict=True)):
            with jax.named_scope(f"layer_{index}"):
                graph, state = nnx.split(module)
                x_TD, k, v = _run_layer(
                    graph, state, x_TD, cache.keys[index], cache.values[index], plan, ropes[layer.rope]
                )
            keys.append(k)
            values.append(v)
        page_size = cache.tokens.shape[1]
        slots_T = plan.slots_T
        tokens = cache.tokens.at[slots_T // page_size, slots_T % page_size].set(tokens_T)
        return replicate(self.final_norm(x_TD)), KVCache(tuple(keys), tuple(values), tokens)

    def logits(self, x_RD: jax.Array) -> jax.Array:
        """Logits float32 [R, V], sharded over V, of hidden states [R, D]."""
        logits_RV = (self.unembed or self.embedding).logits(x_RD)
        if self.spec.logits_softcap is not None:
            logits_RV = self.spec.logits_softcap * jnp.tanh(logits_RV / self.spec.logits_softcap)
        return logits_RV


@partial(jax.jit, static_argnums=0)
def _run_layer(
    graph: nnx.GraphDef[DecoderLayer],
    state: nnx.State,
    x_TD: jax.Array,
    keys: Pages,
    values: Pages,
    plan: AttentionPlan,
    rope: Rope,
) -> tuple[jax.Array, Pages, Pages]:
    """One layer as a function of its own: alike layers are traced once, which makes starting several times faster."""
    return nnx.merge(graph, state)(x_TD, keys, values, plan, rope)


def _apply(norm: RMSNorm | None, x_TD: jax.Array) -> jax.Array:
    return x_TD if norm is None else norm(x_TD)

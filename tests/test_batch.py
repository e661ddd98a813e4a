"""The ladder holds every step that the limits allow; packed plans say what the plan says."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ryzanstein_jax.attention import TILE, TILES, max_tiles
from ryzanstein_jax.batch import Bucket, FullRowLayout, RowLayout, StepLayout, bucket_ladder
from ryzanstein_jax.plan import BIAS, MAX_PREFILLS, ROW, StepPlan, most_prompt_tokens
from tests.support import make_plan

PAGE = 4


def shape_of(decodes: int, lengths: list[int], rows: int) -> StepPlan:
    """A plan of these sizes, of which only the sizes matter."""
    lens = np.array([1] * decodes + lengths, np.int32)
    zeros = np.zeros(int(lens.sum()), np.int32)
    return StepPlan(0, decodes, zeros, zeros, lens, np.zeros((len(lens), 1), np.int32), np.zeros(rows, ROW))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 1024), st.integers(1, 4), st.data())
def test_ladder_holds_every_plan_within_the_limits(max_num_seqs, max_prefill_tokens, smallest, data):
    ladder = bucket_ladder(max_num_seqs, max_prefill_tokens, smallest_decode=smallest)
    most_prefills = max(bucket.prefills for bucket in ladder)
    most_rows = max(bucket.rows for bucket in ladder)
    assert max(bucket.decodes for bucket in ladder) == max_num_seqs
    assert max(bucket.prefill_tokens for bucket in ladder) == max_prefill_tokens
    assert most_prefills == min(MAX_PREFILLS, max_prefill_tokens)
    decodes = data.draw(st.integers(0, max_num_seqs))
    tokens = data.draw(st.integers(0 if decodes else 1, max_prefill_tokens))
    if tokens:
        prefills = data.draw(st.integers(1, min(most_prefills, tokens)))
        lengths = [1] * (prefills - 1) + [tokens - prefills + 1]
        rows = data.draw(st.integers(0, most_rows))
    else:
        lengths, rows = [], decodes
    plan = shape_of(decodes, lengths, rows)
    chosen = next((bucket for bucket in ladder if bucket.holds(plan)), None)
    assert chosen is not None
    assert all(bucket.tokens >= chosen.tokens for bucket in ladder if bucket.holds(plan))
    assert sum(-(-length // TILE) for length in lengths) <= max_tiles(chosen.prefill_tokens, chosen.prefills)


@pytest.mark.parametrize(
    ("tokens", "sequences", "longest", "most"),
    [(512, 256, 8192, 512), (512, 256, 80, 512), (512, 256, 16, 256), (512, 4, 80, 320), (512, 1, 80, 80)],
)
def test_a_step_has_room_for_several_prompts(tokens, sequences, longest, most):
    assert most_prompt_tokens(tokens, sequences, longest) == most


def test_ladder_is_small():
    assert len(bucket_ladder(1, 16)) <= 3
    assert len(bucket_ladder(32, 512)) <= 14
    assert len(bucket_ladder(256, 8192)) <= 24
    assert [b.decodes for b in bucket_ladder(6, 16) if not b.prefill_tokens] == [1, 2, 4, 6]
    assert len({b.sampled_rows for b in bucket_ladder(256, 8192)}) <= 4
    assert all(b.sampled_rows >= b.rows for b in bucket_ladder(256, 8192))
    assert [b.decodes for b in bucket_ladder(8, 16, smallest_decode=4) if not b.prefill_tokens] == [4, 8]


def test_a_plan_too_large_in_any_way_is_not_held():
    bucket = Bucket(2, 8, 2, 4)
    assert bucket.holds(shape_of(2, [4, 4], 4))
    for plan in (shape_of(3, [4, 4], 4), shape_of(2, [4, 5], 4), shape_of(2, [1, 1, 1], 4), shape_of(2, [4, 4], 5)):
        assert not bucket.holds(plan)


def random_plan(seed: int, *, decodes: int, lengths: list[int]) -> StepPlan:
    rng = np.random.default_rng(seed)
    begins = rng.integers(0, 40, decodes + len(lengths)).tolist()
    pages = rng.permutation(np.arange(1, 400)).tolist()
    tables = [
        [pages.pop() for _ in range(-(-(begin + length) // PAGE))]
        for begin, length in zip(begins, [1] * decodes + lengths, strict=True)
    ]
    tokens = rng.integers(0, 99, 400)
    chunks = zip(begins[decodes:], lengths, strict=True)
    return make_plan(
        [(tokens, tables[i], begins[i]) for i in range(decodes)],
        [(tokens, tables[decodes + i], begin, begin + length) for i, (begin, length) in enumerate(chunks)],
    )


PLANS = {
    "mixed": random_plan(0, decodes=2, lengths=[3, TILE + 1, 1]),
    "decodes": random_plan(1, decodes=3, lengths=[]),
    "chunks": random_plan(2, decodes=0, lengths=[2 * TILE, TILE]),
    "full": random_plan(3, decodes=4, lengths=[60, 60, 60, 20]),
}


@pytest.mark.parametrize("name", PLANS)
def test_packed_step(name):
    plan = PLANS[name]
    bucket = Bucket(4, 200, 4, 204)
    layout = StepLayout(bucket, PAGE, 60)
    flat = layout.pack(plan)
    assert flat.dtype == np.int32 and flat.shape == (layout.size,)
    fields = {key: np.asarray(value) for key, value in jax.jit(layout.unpack)(flat).items()}

    place_of_token = []  # in the padded arrays
    tiles, begin, decodes = [], 0, plan.num_decodes
    for sequence, length in enumerate(plan.query_lens.tolist()):
        table = plan.page_tables[sequence]
        for offset in range(length):
            index = begin + offset
            place = index if sequence < decodes else bucket.decodes + index - decodes
            position = int(plan.positions[index])
            place_of_token.append(place)
            assert fields["tokens"][place] == plan.token_ids[index]
            assert fields["positions"][place] == position
            assert fields["slots"][place] == table[position // PAGE] * PAGE + position % PAGE
            if sequence >= decodes and offset % TILE == 0:
                size = min(TILE, int(plan.query_lens[sequence]) - offset)
                tiles.append((index - decodes, sequence - decodes, position, size))
        kind, row = ("decode", sequence) if sequence < decodes else ("prefill", sequence - decodes)
        assert fields[f"{kind}_tables"][row][: len(table)].tolist() == table.tolist()
        assert not fields[f"{kind}_tables"][row][len(table) :].any()
        if sequence < decodes:
            assert fields["decode_lens"][row] == plan.positions[begin] + 1
        begin += length
    assert fields["num_tiles"] == len(tiles)
    found = zip(*(fields[f"tile_{name}"] for name in ("starts", "seqs", "positions", "lens")), strict=True)
    found = [tuple(map(int, tile)) for tile in found]
    assert found[: len(tiles)] == sorted(tiles, key=lambda tile: -tile[2]), "those that reach furthest come first"
    assert all(tile == (*found[len(tiles) - 1][:3], 0) for tile in found[len(tiles) :] if tiles), "padding adds no work"
    assert len(found) % TILES == 0
    assert fields["row_tokens"][: len(plan.rows)].tolist() == [place_of_token[t] for t in plan.rows["token"]]
    padding = np.setdiff1d(np.arange(bucket.tokens), place_of_token)
    assert not fields["slots"][padding].any(), "padding writes to the scratch page"
    assert not fields["decode_lens"][decodes:].any(), "padding attends to nothing"


def test_packed_rows():
    plan = PLANS["mixed"]
    rng = np.random.default_rng(5)
    for field in ROW.names:
        if field not in ("token", "seq"):
            values = rng.integers(0, 1 << 31, plan.rows[field].shape)
            plan.rows[field] = values if ROW[field].base.kind != "f" else rng.random(plan.rows[field].shape)
    bias = np.array([(3, 9, -np.inf), (0, 2, 1.5)], BIAS)
    plan = StepPlan(*(getattr(plan, f) for f in list(StepPlan.__slots__)[:7]), bias=bias)
    count, padded = len(plan.rows), len(plan.rows) + 3
    plain, full = RowLayout(padded), FullRowLayout(padded, 60, 4)
    for layout in (plain, full):
        fields = {key: np.asarray(value) for key, value in jax.jit(layout.unpack)(layout.pack(plan)).items()}
        for name in layout.names:
            assert fields[name].dtype == ROW[name].base
            assert fields[name][:count].tolist() == plan.rows[name].tolist(), name
        assert not fields["temperature"][count:].any(), "padding is greedy"
        assert (fields["top_p"][count:] == 1).all()
    assert (fields["target"][count:] == -1).all() and (fields["repetition_penalty"][count:] == 1).all()
    assert not fields["presence_penalty"][count:].any() and not fields["frequency_penalty"][count:].any()
    width = plan.page_tables.shape[1]
    assert fields["tables"][:count, :width].tolist() == plan.page_tables[plan.rows["seq"]].tolist()
    assert fields["num_bias"] == 2
    assert fields["bias_row"].tolist() == [3, 0, padded, padded], "padding is out of range, which drops it"
    assert fields["bias_token"][:2].tolist() == [9, 2] and fields["bias_value"][:2].tolist() == [-np.inf, 1.5]

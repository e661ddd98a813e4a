import pytest

from ryzanstein_jax.engine.blocks import PagePool, PagePoolError
from ryzanstein_jax.errors import ConfigError


def keys_of(pool: PagePool, tokens: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    pool.extend_keys(keys, tokens, len(tokens) // pool.page_size)
    return keys


def cached(pool: PagePool, tokens: list[int]) -> list[int]:
    """Pages that hold these tokens, findable and owned once."""
    keys = keys_of(pool, tokens)
    pages = pool.acquire(len(keys))
    assert pages is not None
    for page, key in zip(pages, keys, strict=True):
        pool.register(page, key)
    return pages


def test_hands_out_every_page_but_the_scratch_page():
    pool = PagePool(5, 4)
    pages = pool.acquire(4)
    assert sorted(pages) == [1, 2, 3, 4]
    assert pool.acquire(1) is None
    pool.check([pages])
    pool.release(pages)
    assert pool.num_available == 4
    assert pool.num_used == 0
    pool.check([])


def test_too_small_a_pool_is_refused():
    with pytest.raises(ConfigError, match=r"num_pages=1 .* at least 2"):
        PagePool(1, 4)


def test_finds_the_longest_prefix_of_full_pages():
    pool = PagePool(9, 2)
    pages = cached(pool, [1, 2, 3, 4, 5, 6])
    assert pool.match(keys_of(pool, [1, 2, 3, 4, 9, 9])) == pages[:2]
    assert pool.match(keys_of(pool, [1, 2, 3, 4, 5, 6, 7])) == pages
    assert pool.match(keys_of(pool, [1])) == []


def test_the_same_tokens_after_another_prefix_are_another_page():
    pool = PagePool(9, 2)
    cached(pool, [1, 2, 3, 4])
    assert pool.match(keys_of(pool, [3, 4])) == []
    assert pool.match(keys_of(pool, [9, 9, 3, 4])) == []


def test_keys_are_secret_to_a_pool_and_grow_with_the_sequence():
    pool, other = PagePool(9, 2), PagePool(9, 2)
    tokens = [1, 2, 3, 4]
    assert set(keys_of(pool, tokens)).isdisjoint(keys_of(other, tokens))
    keys: list[bytes] = []
    pool.extend_keys(keys, tokens, 1)
    pool.extend_keys(keys, tokens, 2)
    assert keys == keys_of(pool, tokens)


def test_shared_pages_live_until_the_last_owner_leaves():
    pool = PagePool(4, 2)
    first = cached(pool, [1, 2])
    second = pool.acquire(1, shared=pool.match(keys_of(pool, [1, 2])))
    assert second[0] == first[0]
    assert pool.num_used == 2
    pool.check([first, second])
    pool.release(first)
    pool.check([second])
    assert pool.num_used == 2
    pool.release(second)
    assert pool.num_idle == 1
    assert pool.num_available == 3


def test_idle_pages_are_reused_last_and_tails_before_heads():
    pool = PagePool(6, 2)
    old = cached(pool, [1, 2, 3, 4])
    young = cached(pool, [5, 6])
    pool.release(old)
    pool.release(young)
    free = pool.acquire(2)
    assert not set(free) & {*old, *young}, "free pages go before idle ones"
    assert pool.acquire(1) == [old[1]], "the tail of the prefix that was unused the longest"
    assert pool.match(keys_of(pool, [1, 2, 3, 4])) == [old[0]]
    assert pool.match(keys_of(pool, [5, 6])) == young


def test_using_an_idle_page_again_makes_it_young():
    pool = PagePool(3, 2)
    first, second = cached(pool, [1, 2]), cached(pool, [3, 4])
    pool.release(first)
    pool.release(second)
    pool.release(pool.acquire(0, shared=first))
    assert pool.acquire(1) == second


def test_shared_idle_pages_are_not_counted_as_room_for_new_ones():
    pool = PagePool(4, 2)
    pages = cached(pool, [1, 2, 3, 4])
    pool.release(pages)
    assert pool.acquire(2, shared=pages) is None, "3 pages in all: 2 shared leave room for 1"
    pool.check([])
    assert pool.acquire(1, shared=pages, reserve=1) is None
    taken = pool.acquire(1, shared=pages)
    assert taken[:2] == pages
    pool.check([taken])


def test_of_two_pages_with_one_content_the_first_keeps_the_key():
    pool = PagePool(4, 2)
    first, second = cached(pool, [1, 2]), cached(pool, [1, 2])
    assert pool.match(keys_of(pool, [1, 2])) == first != second
    pool.release(second)
    assert pool.num_idle == 0
    pool.check([first])


def test_without_prefix_caching_nothing_is_kept():
    pool = PagePool(4, 2, enable_prefix_caching=False)
    pages = cached(pool, [1, 2])
    assert pool.match(keys_of(pool, [1, 2])) == []
    pool.release(pages)
    assert pool.num_idle == 0
    pool.check([])


def test_check_notices_each_kind_of_defect():
    pool = PagePool(6, 2)
    pages = cached(pool, [1, 2, 3, 4])
    with pytest.raises(PagePoolError, match=r"0 owners but counts 1"):
        pool.check([])
    with pytest.raises(PagePoolError, match=r"2 owners but counts 1"):
        pool.check([pages, pages])
    with pytest.raises(PagePoolError, match="twice"):
        pool.check([[1, 1]])
    pool._free.append(pages[0])
    with pytest.raises(PagePoolError, match=r"page 1 is in 2 of the states"):
        pool.check([pages])
    pool._free.remove(pages[0])
    lost = pool._free.pop()
    with pytest.raises(PagePoolError, match=rf"page {lost} is in 0 of the states"):
        pool.check([pages])
    pool._free.append(lost)
    pool.check([pages])
    pool._free.append(0)
    with pytest.raises(PagePoolError, match=r"page 0 is in 2"):
        pool.check([pages])
    pool._free.remove(0)
    pool._key_of_page.pop(pages[0])
    with pytest.raises(PagePoolError, match="disagree"):
        pool.check([pages])

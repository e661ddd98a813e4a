"""Programs kept on disk: found again, never confused, and refused where anybody else may have written them."""

import logging
import os
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from ryzanstein_jax import executables
from ryzanstein_jax.batch import bucket_ladder
from ryzanstein_jax.executables import ExecutableStore, environment_of, open_store, program_key, program_sources
from ryzanstein_jax.metrics import Metrics
from ryzanstein_jax.program_table import BackgroundLoader, ProgramTable
from ryzanstein_jax.request import SamplingParams
from ryzanstein_jax.sharding import PaddedSizes, collectives, make_mesh
from ryzanstein_jax.step import StepPrograms, StepShapes
from tests.support import GOLDEN, counted_compiles, golden_spec, open_engine, quick_compiles, serve, tokens_of
from tests.test_architecture import FLOORS, modules

MESH = make_mesh(2)
SHARDED = NamedSharding(MESH, PartitionSpec("tp"))


def lower_sum(size: int = 8):
    """Adds a vector to the (donated) first argument and sums over both devices."""
    values = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=SHARDED)
    jitted = jax.jit(
        lambda x, y: (x + y, jnp.sum(x) + jnp.arange(size).sum()),
        donate_argnums=0, out_shardings=(SHARDED, NamedSharding(MESH, PartitionSpec())),
    )  # fmt: skip
    return jitted.lower(values, values)


def compile_sum():
    return lower_sum().compile()


@pytest.fixture
def store(tmp_path: Path) -> ExecutableStore:
    return ExecutableStore(tmp_path / "executables")


def entry(store: ExecutableStore) -> Path:
    (path,) = store.folder.glob("*.executable")
    return path


def test_a_program_is_found_again_and_runs_as_before(store):
    compiled = compile_sum()
    assert store.load("k", MESH) is None and store.temporaries("k") is None
    assert store.save("k", compiled)
    with counted_compiles() as compiles:
        loaded = store.load("k", MESH)
        assert loaded is not None and compiles() == 0
    # Made by a program: the memory of a numpy array may be shared, and then cannot be given away.
    x = jax.jit(lambda: jnp.arange(8, dtype=jnp.float32), out_shardings=SHARDED)()
    y = np.ones(8, np.float32)
    pointers = [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]
    added, total = loaded(x, y)
    np.testing.assert_array_equal(added, np.arange(8) + 1)
    assert float(total) == 28 + 28
    assert x.is_deleted() and [s.data.unsafe_buffer_pointer() for s in added.addressable_shards] == pointers
    assert collectives(loaded) == collectives(compiled) != []
    analysis = compiled.memory_analysis()
    assert loaded.memory_analysis().temp_size_in_bytes == analysis.temp_size_in_bytes == store.temporaries("k")


def test_only_the_user_can_read_or_write_what_is_kept(store):
    before = os.umask(0)
    try:
        store.save("k", compile_sum())
        other = ExecutableStore(store.folder.parent / "other")
    finally:
        os.umask(before)
    assert entry(store).stat().st_mode & 0o777 == 0o600
    assert other.folder.stat().st_mode & 0o777 == 0o700


def spoil_folder(store, path, monkeypatch):
    store.folder.chmod(0o777)


def spoil_mode(store, path, monkeypatch):
    path.chmod(0o620)


def spoil_owner(store, path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)


def spoil_link(store, path, monkeypatch):
    path.rename(store.folder / "elsewhere")
    path.symlink_to(store.folder / "elsewhere")


def spoil_kind(store, path, monkeypatch):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [spoil_folder, spoil_mode, spoil_owner, spoil_link, spoil_kind])
def test_what_others_may_have_written_is_never_unpickled(store, monkeypatch, caplog, spoil):
    store.save("k", compile_sum())
    monkeypatch.setattr(executables.pickle, "loads", lambda data: pytest.fail("unpickled"))
    spoil(store, entry(store), monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert store.load("k", MESH) is None and store.temporaries("k") is None
    assert "ignoring" in caplog.text


def test_a_store_that_is_not_the_users_own_is_not_opened(tmp_path, caplog):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert open_store(tmp_path / "open") is None and open_store(tmp_path / "file") is None
    assert "others may write" in caplog.text
    assert open_store(tmp_path / "new" / "folder") is not None


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: b"X" + content[1:],
        lambda content: content[:41] + b"\x01" + content[42:],
        lambda content: content[:-50] + bytes([content[-50] ^ 1]) + content[-49:],
    ],
)
def test_a_damaged_entry_is_the_same_as_none_and_is_replaced(store, caplog, damage):
    compiled = compile_sum()
    store.save("k", compiled)
    entry(store).write_bytes(damage(entry(store).read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert store.load("k", MESH) is None and store.temporaries("k") is None
    assert "damaged" in caplog.text
    assert store.save("k", compiled) and store.load("k", MESH) is not None


def test_an_intact_entry_that_does_not_load_is_the_same_as_none(store, monkeypatch, caplog):
    monkeypatch.setattr(executables.serialize_executable, "serialize", lambda compiled: (b"no program", None, None))
    store.save("k", compile_sum())
    with caplog.at_level(logging.WARNING):
        assert store.load("k", MESH) is None
    assert "compiling again" in caplog.text


def test_what_cannot_be_kept_is_no_failure(store, monkeypatch):
    def refuse(compiled):
        raise ValueError("Compilation does not support serialization")

    compiled = compile_sum()
    with monkeypatch.context() as patch:
        patch.setattr(executables.serialize_executable, "serialize", refuse)
        assert not store.save("k", compiled)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert not store.save("k", compiled)
    assert list(store.folder.iterdir()) == []
    store.max_bytes = 100
    assert not store.save("k", compiled)


def test_what_was_used_longest_ago_goes_first(store):
    compiled = compile_sum()
    for key, age in (("a", 300), ("b", 200), ("c", 100)):
        store.save(key, compiled)
        path = store.folder / f"{key}.executable"
        os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    (store.folder / ".partial-left").touch()
    store = ExecutableStore(store.folder)
    assert store.load("a", MESH) is not None
    store.max_bytes = int(3.5 * path.stat().st_size)
    store.save("d", compiled)
    assert sorted(path.name[0] for path in store.folder.iterdir()) == ["a", "c", "d"]


def test_several_writers_and_readers_of_one_entry(store):
    compiled, results = compile_sum(), []

    def work():
        for _ in range(5):
            assert store.save("k", compiled)
            results.append(ExecutableStore(store.folder).load("k", MESH) is not None)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 20 and len(list(store.folder.iterdir())) == 1


def test_keys_tell_programs_and_environments_apart(monkeypatch):
    environment = environment_of(MESH)
    assert environment_of(MESH) == environment
    keys = [program_key({"kind": "a", "size": 1}, environment)]
    assert program_key({"size": 1, "kind": "a"}, environment) == keys[0]
    keys.append(program_key({"kind": "a", "size": 2}, environment))
    keys.append(program_key({"kind": "a", "size": "1"}, environment))
    keys.append(program_key({"kind": "a", "size": 1}, environment_of(make_mesh(4))))
    for target, value in (
        ("jax.__version__", "0.0.1"),
        ("jax.process_index", lambda: 1),
        ("jax.process_count", lambda: 2),
        ("ryzanstein_jax.executables.sources_digest", lambda: "other"),
        ("ryzanstein_jax.executables._host_processor", lambda: ("other",)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, value)
            keys.append(program_key({"kind": "a", "size": 1}, environment_of(MESH)))
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        keys.append(program_key({"kind": "a", "size": 1}, environment_of(MESH)))
    with quick_compiles():
        keys.append(program_key({"kind": "a", "size": 1}, environment_of(MESH)))
    assert len(set(keys)) == len(keys) == 11


def test_every_file_that_programs_are_made_of_counts(monkeypatch, tmp_path):
    covered = set(program_sources())
    made_of = {modules()[name] for name in (*FLOORS[1], "plan") if name in modules()}
    assert made_of <= covered
    assert {path.name for path in covered - made_of} <= {"__init__.py"}
    before = executables.sources_digest()
    changed = tmp_path / "step.py"
    changed.write_text("# changed")
    monkeypatch.setattr(executables, "program_sources", lambda: [changed])
    executables.sources_digest.cache_clear()
    assert executables.sources_digest() != before
    executables.sources_digest.cache_clear()


def test_step_programs_come_from_the_store(store):
    spec = golden_spec("smollm2")
    spec = spec.replace(layers=spec.layers[:1])
    buckets = tuple(bucket_ladder(1, 16))

    def start(num_pages: int = 8) -> tuple[Metrics, StepPrograms]:
        shapes, metrics = StepShapes(buckets, num_pages, 4, 8, num_logprobs=2, max_bias=8), Metrics()
        programs = StepPrograms(
            spec, PaddedSizes.of(spec, 2), jnp.dtype("float32"), MESH, shapes, metrics=metrics, store=store
        )
        programs.temporaries(buckets[-1])
        programs.compile_all()
        programs.make_cache()
        return metrics, programs

    with quick_compiles():
        cold, first = start()
        with counted_compiles() as compiles:
            warm, second = start()
            assert compiles() == 0
        other, _ = start(num_pages=9)
    total = len(first.forwards) + 2 * len(first.samplers)
    assert [metrics.counter("compiles") for metrics in (cold, warm, other)] == [total] * 3
    assert [metrics.counter("executables_loaded") for metrics in (cold, warm)] == [0, total + 1]
    # Samplers see of the pages only what penalties count: but whatever the shapes say is part of the key.
    assert other.counter("executables_loaded") == 0
    assert second.temporaries(buckets[-1]) == first.temporaries(buckets[-1]) > 0


@pytest.fixture
def jax_cache(tmp_path):
    """JAX's own cache of compiled programs in a folder, for one test."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path / "jax"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield tmp_path / "jax"


def test_what_comes_out_of_jaxs_own_cache_is_not_kept(store, jax_cache):
    """Written again it lacks its machine code, and fails only once it runs."""
    store.compile("miss", lower_sum(24))
    assert len(list(jax_cache.glob("*-cache"))) == 1
    x = jax.device_put(np.arange(24, dtype=np.float32), SHARDED)
    added, _ = store.load("miss", MESH)(x, np.ones(24, np.float32))
    np.testing.assert_array_equal(added, np.arange(24) + 1)
    jax.clear_caches()
    store.compile("hit", lower_sum(24))
    assert store.load("hit", MESH) is None


def test_programs_that_are_not_needed_first_are_postponed(store):
    spec = golden_spec("smollm2")
    spec = spec.replace(layers=spec.layers[:1])
    buckets = tuple(bucket_ladder(2, 16))

    def start(**how) -> tuple[StepPrograms, list, list]:
        shapes, seen = StepShapes(buckets, 8, 4, 8, num_logprobs=2, max_bias=8), []
        programs = StepPrograms(spec, PaddedSizes.of(spec, 1), jnp.dtype("float32"), make_mesh(1), shapes, store=store)
        return programs, programs.compile_all(lambda *state: seen.append(state), **how), seen

    with quick_compiles():
        cold, later, _ = start(first=buckets[:1])
        assert later == [] and set(cold.forwards) == set(buckets), "nothing lies ready yet"
        total = cold.metrics.counter("compiles")
        warm, later, seen = start(first=buckets[:1])
        assert set(warm.forwards) == {buckets[0]} and set(warm.samplers) == {1} and warm.full_samplers == {}
        assert len(later) == total - 2 and seen == [(total - 2, total), (total - 1, total), (total, total)]
        assert warm.forwards[buckets[-1]] is warm.forwards[buckets[-1]], "loaded when asked for, and once"
        with pytest.raises(KeyError):
            warm.forwards["no such size"]
        loader = BackgroundLoader(later)
        loader.wait()
        assert loader.has_loaded
        assert set(warm.forwards) == set(buckets) and set(warm.full_samplers) == set(cold.full_samplers)
        counted = warm.metrics.snapshot()["counters"]
        assert counted == {"compiles": total, "executables_loaded": total}

        # An entry that lay there and turns out damaged is compiled, and that shows.
        again, later, _ = start(first=[])
        for path in store.folder.iterdir():
            path.write_bytes(b"damaged")
        table, size = later[0]
        assert table[size] is not None and again.metrics.counter("compiles") == total + 1

        everything, later, _ = start()
        assert later == [] and len(everything.forwards) == len(buckets)


def test_the_background_stops_before_the_next_load():
    started, go, loaded = threading.Event(), threading.Event(), []

    def make(size, postponed):
        started.set()
        go.wait(10)
        loaded.append(size)
        return size

    table = ProgramTable(make)
    table.postponed = {1, 2}
    loader = BackgroundLoader([(table, 1), (table, 2)])
    assert started.wait(10)
    loader.stop()
    go.set()
    loader.wait()
    assert loaded == [1] and table.postponed == {2} and not loader.has_loaded


def test_the_background_waits_until_nothing_is_going_on():
    idle, asked = [0.0], threading.Event()

    def idle_seconds():
        asked.set()
        return idle[0]

    table, done = ProgramTable(lambda size, postponed: size), []
    table.postponed = {1, 2}
    loader = BackgroundLoader([(table, 1), (table, 2)], lambda: done.append(True), idle_seconds)
    assert asked.wait(10) and not loader._thread.join(0.2) and table == {} and not done
    assert table[2] == 2, "who asks does not wait"
    loader.load_all()
    assert table == {1: 1, 2: 2} and table.postponed == set() and not done
    idle[0] = 1.0
    loader.wait()
    assert done


def test_a_second_engine_compiles_nothing_and_gives_the_same_tokens(tmp_path, monkeypatch):
    requests = {"r": ([5, 6, 7], SamplingParams(seed=1, logprobs=2, max_tokens=5, ignore_eos=True))}
    found, loaded = [], []
    with quick_compiles():
        for _ in range(2):
            engine, executor = open_engine(
                GOLDEN / "smollm2", max_num_seqs=1, tensor_parallel_size=2, compilation_cache_dir=str(tmp_path)
            )
            found.append((tokens_of(serve(engine, requests)), executor.collectives()))
            loaded.append(executor.report.num_loaded)
            engine.close()
            monkeypatch.setattr(StepPrograms, "lower_forward", lambda *arguments: pytest.fail("lowers"))
    assert found[0] == found[1]
    assert loaded == [0, executor.report.num_programs + 1]

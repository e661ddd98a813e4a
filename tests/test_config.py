"""Settings: the valid ones pass, each invalid one is named with its value and the remedy."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ryzanstein_jax.config import DTYPES, LOAD_FORMATS, EngineConfig
from ryzanstein_jax.errors import ConfigError, RyzansteinError, counted

INTEGERS = {
    "tensor_parallel_size": (1, 4096),
    "max_model_len": (2, 1 << 24),
    "data_parallel_size": (1, 256),
    "num_pages": (2, 1 << 30),
    "max_num_seqs": (1, 4096),
    "max_num_batched_tokens": (16, 1 << 20),
    "seed": (0, (1 << 63) - 1),
    "max_logprobs": (0, 1024),
    "max_logit_bias": (0, 4096),
}


def test_defaults_are_valid_and_work_with_a_model_alone() -> None:
    config = EngineConfig("smollm2")
    assert (config.tensor_parallel_size, config.dtype, config.load_format) == (1, "auto", "auto")
    assert config.max_model_len is None and config.memory_fraction is None


@pytest.mark.parametrize("field", INTEGERS)
def test_the_limits_of_a_whole_number_are_inside(field: str) -> None:
    for value in INTEGERS[field]:
        assert getattr(EngineConfig("m", **{field: value}), field) == value


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("wrong", ["below", "above", 1.0, "1", True, [1], float("nan"), b"1"])
def test_other_whole_numbers_and_other_types_are_refused(field: str, wrong: Any) -> None:
    low, high = INTEGERS[field]
    value = {"below": low - 1, "above": high + 1}.get(wrong, wrong) if isinstance(wrong, str) else wrong
    with pytest.raises(
        ConfigError, match=f"^{field}=.* is invalid: use a whole number from {low} to {high}$"
    ) as caught:
        EngineConfig("m", **{field: value})
    assert (caught.value.field, caught.value.value) == (field, value) or value != value


@pytest.mark.parametrize("field", [field for field in INTEGERS if field not in ("max_model_len", "num_pages")])
def test_none_is_for_optional_numbers_only(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        EngineConfig("m", **{field: None})


@pytest.mark.parametrize("size", [1, 2, 16, 256, 1024])
def test_pages_of_a_power_of_two(size: int) -> None:
    assert EngineConfig("m", page_size=size).page_size == size


@pytest.mark.parametrize("size", [0, -16, 3, 24, 1023, 2048, 16.0, None])
def test_pages_of_another_size_are_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match="page_size"):
        EngineConfig("m", page_size=size)


@pytest.mark.parametrize("fraction", [1, 1.0, 0.5, 1e-6])
def test_memory_fractions(fraction: float) -> None:
    assert EngineConfig("m", memory_fraction=fraction).memory_fraction == fraction


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, 90, float("nan"), float("inf"), "0.9", [0.5], True])
def test_memory_fractions_outside_are_refused(fraction: Any) -> None:
    with pytest.raises(ConfigError, match="memory_fraction"):
        EngineConfig("m", memory_fraction=fraction)


@pytest.mark.parametrize(("field", "known"), [("dtype", DTYPES), ("load_format", LOAD_FORMATS)])
def test_choices(field: str, known: tuple[str, ...]) -> None:
    for value in known:
        assert getattr(EngineConfig("m", **{field: value}), field) == value
    for wrong in ("", "FLOAT32", "pickle", None, 16, ["auto"]):
        with pytest.raises(ConfigError, match=f"{field}=.*use one of {', '.join(known)}"):
            EngineConfig("m", **{field: wrong})


@pytest.mark.parametrize("model", ["", "  ", None, 3, b"model", ["m"]])
def test_a_model_has_to_be_named(model: Any) -> None:
    with pytest.raises(ConfigError, match="model="):
        EngineConfig(model)


def test_a_path_is_as_good_as_its_name() -> None:
    assert EngineConfig(Path("models") / "tiny").model == str(Path("models/tiny"))


def test_settings_do_not_change_and_compare_by_value() -> None:
    config = EngineConfig("m")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    assert config == EngineConfig("m")
    assert hash(config) == hash(EngineConfig("m"))


def test_replace_validates_again_and_leaves_the_original() -> None:
    config = EngineConfig("m", seed=1)
    assert config.replace(seed=2, dtype="float32") == EngineConfig("m", seed=2, dtype="float32")
    assert config.seed == 1
    with pytest.raises(ConfigError, match="seed=-1"):
        config.replace(seed=-1)
    with pytest.raises(TypeError):
        config.replace(sed=1)


def test_a_config_error_is_a_value_error_and_ours() -> None:
    with pytest.raises(ValueError, match="dtype='int8' is invalid"):
        EngineConfig("m", dtype="int8")
    assert issubclass(ConfigError, RyzansteinError)


def test_every_setting_is_described() -> None:
    text = EngineConfig.__doc__ or ""
    missing = [field.name for field in dataclasses.fields(EngineConfig) if f"    {field.name}: " not in text]
    assert missing == []


def test_things_are_counted_in_words():
    assert [counted(count, "request") for count in (0, 1, 2)] == ["0 requests", "1 request", "2 requests"]
    assert counted(2, "process") == "2 processes"

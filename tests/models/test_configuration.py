"""CABMambaConfig: derived sizes, and messages that hold both numbers and a value that works."""

import copy
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import largest_difference, random_ids, shake

from cab_hf.models import CABMambaConfig, CABMambaForCausalLM


BASE = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2}
SSD = {**BASE, "mixer_type": "mamba2", "head_dim": 16}


def test_derived_sizes():
    config = CABMambaConfig(**BASE)
    assert (config.mixer_width, config.state_size, config.time_step_rank) == (96, 16, 3)
    assert config.layer_mixer_types == ["mamba", "mamba"]
    assert config.layer_types == ["linear_attention", "linear_attention"]
    config = CABMambaConfig(**SSD, n_groups=2)
    assert (config.state_size, config.num_heads, config.group_size) == (128, 6, 48)
    config = CABMambaConfig(**{**SSD, "mixer_type": "mamba"}, mixer_types=["mamba", "mamba2"])
    assert config.layer_mixer_types == ["mamba", "mamba2"] and config.state_size == 128
    assert CABMambaConfig(**SSD, mixer_types=["mamba", "mamba"]).state_size == 16
    assert CABMambaConfig(**{**BASE, "hidden_size": 33}, expand=1.5).mixer_width == 50


def test_numbers_of_a_yaml_file_are_taken():
    config = CABMambaConfig(**SSD, memory_range=[8, 512], time_step_limit=[0, 1], expand=2.0)
    assert tuple(config.memory_range) == (8, 512) and tuple(config.time_step_limit) == (0, 1)
    assert config.num_heads == 6


def test_defaults_are_those_of_stock_mamba():
    config = CABMambaConfig()
    assert config.mixer_type == "mamba" and config.intermediate_size is None and config.tie_word_embeddings
    assert config.transition_init == "identity"
    assert (config.conv_init, config.gate_init, config.skip_init) == ("usual", "usual", "usual")


@pytest.mark.parametrize(
    "arguments, numbers",
    [
        ({**SSD, "head_dim": 64}, ["1 * 64 = 64", "2 * 48 = 96"]),
        ({**SSD, "num_heads": 5}, ["5 * 16 = 80", "2 * 48 = 96"]),
        ({**SSD, "hidden_size": 35}, ["4 * 16 = 64", "2 * 35 = 70"]),
        ({**SSD, "num_heads": 7, "head_dim": 13, "expand": 1.5}, ["7 * 13 = 91", "1.5 * 48 = 72"]),
        ({**SSD, "n_groups": 4}, ["`num_heads` (6)", "`n_groups` (4)"]),
        ({**SSD, "n_groups": 7}, ["`num_heads` (6)", "`n_groups` (7)"]),
        ({**BASE, "expand": 0}, ["0 * 48 = 0"]),
        ({**BASE, "expand": 0.01}, ["0.01 * 48 = 0"]),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_come_with_one_that_does(arguments, numbers):
    with pytest.raises(Exception, match="Class validation error") as error:
        CABMambaConfig(**arguments)
    message = str(error.value)
    for number in numbers:
        assert number in message
    for suggestion in suggestions(message):
        CABMambaConfig(**{**arguments, **suggestion})


def suggestions(message: str) -> list[dict[str, int | float]]:
    """What a message offers: each `name=value`, or several joined by "with"."""
    offers = re.findall(r"`(\w+)=([\d.e+]+)`(?: with `(\w+)=([\d.e+]+)`)?", message)
    assert offers, message
    pairs = [[(first, value), (second, other)] for first, value, second, other in offers]
    return [
        {name: float(value) if name == "expand" else int(value) for name, value in offer if name} for offer in pairs
    ]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    hidden_size=st.integers(2, 5000),
    expand=st.sampled_from([1, 1.5, 2, 3, 0.5]),
    head_dim=st.integers(1, 200),
    num_heads=st.one_of(st.none(), st.integers(1, 50)),
)
def test_every_suggestion_works(hidden_size, expand, head_dim, num_heads):
    sizes = {"hidden_size": hidden_size, "expand": expand, "head_dim": head_dim, "num_heads": num_heads}
    try:
        CABMambaConfig(mixer_type="mamba2", **sizes)
    except StrictDataclassError as error:
        for suggestion in suggestions(str(error)):
            CABMambaConfig(mixer_type="mamba2", **{**sizes, **suggestion})


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"mixer_types": ["mamba"]}, ["`mixer_types` names 1", "`num_hidden_layers` is 2", "`mixer_type`"]),
        ({"mixer_types": []}, ["`mixer_types` names 0", "`num_hidden_layers` is 2"]),
        ({"mixer_types": ["mamba", "attention"]}, ["['attention']", "['mamba', 'mamba2']"]),
        ({"mixer_types": ["attention", "attention"]}, ["['attention']", "['mamba', 'mamba2']"]),
        ({"gate_init": "transparent"}, ["`use_bias=True`", "`use_bias=False`"]),
        ({"shared_norm": True}, ["`parallel_residual=False`", "`intermediate_size=None`"]),
        ({"shared_norm": True, "parallel_residual": True}, ["`parallel_residual=True`", "`intermediate_size=None`"]),
        ({"time_step_limit": (2.0, 1.0)}, ["`time_step_limit`", "(2.0, 1.0)"]),
        ({"time_step_limit": (1.0,)}, ["`time_step_limit`", "(1.0,)"]),
        ({"memory_range": (0.0, 8.0)}, ["`memory_range`", "(0.0, 8.0)", "positive"]),
        ({"memory_range": (8.0, float("inf"))}, ["`memory_range`", "finite", "identity"]),
        ({"memory_range": (9.0, 8.0)}, ["`memory_range`", "(9.0, 8.0)"]),
        ({"time_step_min": 0.0}, ["`time_step_min`", "(0.0, 0.1)", "(0.001, 0.1)"]),
        ({"time_step_min": 0.5}, ["`time_step_min`", "(0.5, 0.1)"]),
        *(({name: 0}, [f"`{name}` must be at least 1, got 0"]) for name in ("vocab_size", "hidden_size", "head_dim")),
        *(({name: 0}, [f"`{name}` must be at least 1, got 0"]) for name in ("num_hidden_layers", "state_size")),
        *(({name: 0}, [f"`{name}` must be at least 1, got 0"]) for name in ("n_groups", "conv_kernel", "chunk_size")),
        *(({name: -1}, [f"`{name}` must be at least 1, got -1"]) for name in ("num_heads", "time_step_rank")),
        ({"mixer_type": "mamba3"}, ["mamba3", "'mamba', 'mamba2'"]),
        ({"transition_init": "hippo"}, ["hippo", "'identity', 's4d', 'moving_average'"]),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(arguments, words):
    with pytest.raises(Exception, match="alidation error") as error:
        CABMambaConfig(**{**BASE, **arguments})
    for word in words:
        assert word in str(error.value)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data(), mixer_type=st.sampled_from(["mamba", "mamba2"]), length=st.integers(1, 33))
@torch.no_grad()
def test_any_shape_runs_and_chunks_do_not_matter(data, mixer_type, length):
    """Odd widths, heads, groups and lengths: finite, the same in chunks of another size and fed in two parts."""
    n_groups = data.draw(st.integers(1, 4), label="n_groups")
    num_heads = n_groups * data.draw(st.integers(1, 3), label="heads in a group")
    head_dim = data.draw(st.integers(1, 7), label="head_dim")
    hidden_size = data.draw(st.sampled_from([5, 8, 11, 16, 19]), label="hidden_size")
    chunk_sizes = data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=2), label="chunk sizes")
    config = CABMambaConfig(
        vocab_size=31,
        hidden_size=hidden_size,
        num_hidden_layers=1,
        mixer_type=mixer_type,
        num_heads=num_heads,
        n_groups=n_groups,
        head_dim=head_dim,
        expand=num_heads * head_dim / hidden_size,
        state_size=data.draw(st.integers(1, 9), label="state_size"),
        conv_kernel=data.draw(st.integers(1, 5), label="conv_kernel"),
        chunk_size=chunk_sizes[0],
        transition_init="s4d",
    )
    torch.manual_seed(0)
    model = shake(CABMambaForCausalLM(config).eval())
    ids = random_ids(2, length, vocab_size=31)
    logits = model(ids).logits
    assert logits.shape == (2, length, 31) and bool(logits.isfinite().all())
    model.config.chunk_size = chunk_sizes[1]
    scale = max(1.0, float(logits.abs().max()))
    assert largest_difference(model(ids).logits, logits) < 1e-4 * scale
    cut = data.draw(st.integers(0, length - 1), label="cut")
    if cut:
        first = model(ids[:, :cut], use_cache=True)
        second = model(ids[:, cut:], cache=first.cache, use_cache=True)
        assert largest_difference(torch.cat([first.logits, second.logits], dim=1), logits) < 1e-4 * scale


def test_configs_can_be_copied_and_compared():
    config = CABMambaConfig(**SSD, mixer_types=["mamba", "mamba2"])
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    assert CABMambaConfig(**{**config.to_dict(), "chunk_size": 8}).chunk_size == 8

"""Attention that is read by asking it: what is exact, what is refused, and by which number."""

import time

import pytest
import torch
from transformers import AutoModel, CLIPConfig, CLIPModel, DINOv3ViTConfig, LlamaConfig, LlamaForCausalLM

from cab_hf.evaluation.tiny_families import tiny_model
from cab_hf.teachers.attention_interface import register_recording
from cab_hf.teachers.examination import recorded
from cab_hf.transfer import reading
from cab_hf.transfer.hybrid import hybrid_from_teacher, norm_epsilon
from cab_hf.transfer.reading import check_readings, read_attention


def largest_errors(model):
    readings, left_out = read_attention(model)
    assert not left_out
    return {part: max(one.errors[part] for one in readings.values()) for part in reading.PARTS}


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gpt_neox", "phi3", "gemma2", "mixtral", "olmo2", "cohere", "bloom"]
)
def test_what_a_linear_layer_explains_is_its_weight(family):
    if family == "bloom":
        with pytest.raises(ValueError, match="BloomForCausalLM.*'bloom'.*shows no attention.*usual names"):
            read_attention(tiny_model(family))
        return
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    errors = largest_errors(model)
    assert max(errors.values()) < 1e-5, errors
    if family not in ("olmo2", "cohere"):  # norms stand behind their queries and keys
        assert set(errors.values()) == {0.0}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_every_row_of_a_projection_is_read():
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    one = read_attention(model)[0]["layers.1.self_attn"]
    for part, child in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "o_proj")):
        assert torch.equal(getattr(one, part).weight, getattr(attention, child).weight)
    assert (one.heads, one.head_dim, one.key_dim, one.causal, one.scaling) == (4, 16, 16, True, 0.25)


def test_unit_vectors_give_the_same_where_no_linear_layer_is_found(monkeypatch):
    model = tiny_model("starcoder2")
    known = read_attention(model)[0]
    monkeypatch.setattr(reading, "_explained", lambda *args: None)
    monkeypatch.setattr(reading, "_UNITS_AT_ONCE", 7)
    for path, one in read_attention(model)[0].items():
        for part in ("query", "key", "value"):
            for ours, theirs in zip(getattr(one, part), getattr(known[path], part), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert 0 < max(one.errors.values()) < 1e-5


def test_patches_that_are_rotated_everywhere_are_read_without_their_rotation(monkeypatch):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    model = AutoModel.from_config(DINOv3ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
    monkeypatch.setattr(reading, "_explained", lambda *args: None)
    assert max(largest_errors(model).values()) < 1e-5
    assert not any(one.causal for one in read_attention(model)[0].values())
    # Rotated, queries and keys of one token are no map of another's: their errors must show it, values' must not.
    rows = reading._for_rows
    monkeypatch.setattr(reading, "_for_rows", lambda x, count: x if type(x) is tuple else rows(x, count))
    errors = largest_errors(model)
    assert errors["query"] > 0.3 and errors["key"] > 0.3 and errors["value"] < 1e-5
    with pytest.raises(ValueError, match=r"its (key|query) is off by \d+\.\d%"):
        check_readings(model, *read_attention(model))


@pytest.mark.parametrize(
    ("family", "part"),
    [("deepseek_v3", "value"), ("minicpm3", "value"), ("gemma3n_text", "value"), ("qwen3_next", "output")],
)
def test_what_is_not_linear_is_refused_with_its_number_and_path_or_accepted_and_noted(family, part):
    model = tiny_model(family)
    with pytest.raises(ValueError, match=r"layers\.\d+\.self_attn.*on random input.*off by \d+\.\d%.*accept_inexact"):
        hybrid_from_teacher(model)
    student = hybrid_from_teacher(model, accept_inexact=10.0)
    noted = [student.config.settings(path).get("inexact", {}) for path in student.mixers]
    assert any(0.05 < one.get(part, 0.0) for one in noted), noted
    with pytest.raises(ValueError, match="is not linear"):
        hybrid_from_teacher(model, accept_inexact=0.01)


def test_a_residual_inside_is_refused():
    model = AutoModel.from_config(tiny_albert()).eval()
    readings, left_out = read_attention(model)
    assert not readings
    with pytest.raises(ValueError, match=r"'encoder\.albert.*attention'.*(residual|attends \d times).*keep_attention"):
        check_readings(model, readings, left_out)
    with recorded(model), torch.no_grad(), reading.called({"a": attention_of(model)}) as sites:
        model(torch.tensor([[5]]))
        with pytest.raises(ValueError, match="a residual stands inside of it"):
            reading._read(sites["a"], sites["a"])


def tiny_albert():
    from transformers import AlbertConfig

    sizes = {"hidden_size": 32, "embedding_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AlbertConfig(**sizes, intermediate_size=48, vocab_size=99)


def attention_of(model):
    return model.encoder.albert_layer_groups[0].albert_layers[0].attention


@pytest.mark.parametrize(
    ("family", "fields", "causal"),
    [
        ("bert", {}, False),
        ("bert", {"is_decoder": True}, True),
        ("mistral", {"sliding_window": 2}, True),
        ("modernbert-decoder", {}, True),
    ],
)
def test_causality_is_measured_past_windows_too(family, fields, causal):
    readings, _ = read_attention(tiny_model(family, **fields))
    assert {one.causal for one in readings.values()} == {causal}


def test_a_window_that_sees_nothing_of_the_last_token_is_not_taken_for_causal():
    model = AutoModel.from_config(modern_bert()).eval()
    assert {one.causal for one in read_attention(model)[0].values()} == {False}


def modern_bert():
    from transformers import ModernBertConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return ModernBertConfig(**sizes, vocab_size=99, local_attention=2, global_attn_every_n_layers=9, pad_token_id=0)


def test_attention_that_computes_itself_is_compared_with_its_named_projections():
    model = tiny_model("gpt_neo")
    readings, left_out = read_attention(model)
    assert not left_out and {one.scaling for one in readings.values()} == {1.0}
    assert max(max(one.errors.values()) for one in readings.values()) < 1e-5
    attention = model.transformer.h[0].attn.attention
    attention.k_proj.register_forward_hook(lambda module, args, output: output * 2)
    assert read_attention(model)[0]["h.0.attn.attention"].errors["key"] > 0.01


@pytest.mark.parametrize("family", ["big_bird", "git"])
def test_modules_that_a_pass_replaces_or_never_calls(family):
    """BigBird puts full attention in place of the sparse one at a short row; GIT's image encoder reads no text."""
    readings, left_out = read_attention(tiny_model(family))
    assert list(readings) == [f"encoder.layer.{index}.attention.self" for index in range(4)] and not left_out


def test_each_part_has_its_attention_implementation_back():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = CLIPModel(CLIPConfig(text_config=sizes, vision_config=sizes | {"image_size": 32, "patch_size": 16}))
    model.vision_model.set_attn_implementation("eager")
    with recorded(model):
        assert model.text_model.config._attn_implementation == register_recording("sdpa")
    found = [part.config._attn_implementation for part in (model, model.text_model, model.vision_model)]
    assert found == ["sdpa", "sdpa", "eager"]


@pytest.mark.parametrize(("family", "epsilon"), [("qwen2", 1e-6), ("olmo2", 1e-5), ("gpt2", 1e-5), ("glm", 1.5625e-7)])
def test_epsilon_is_the_teachers(family, epsilon):
    model = tiny_model(family)
    assert norm_epsilon(model) == epsilon
    tokens = torch.arange(24).view(2, 12)
    right, wrong = hybrid_from_teacher(model), hybrid_from_teacher(model, layer_norm_epsilon=1e-3)
    with torch.no_grad():
        right, wrong = right(tokens).logits, wrong(tokens).logits
    assert (right - wrong).norm() > 0.05 * right.norm()


def test_half_precision_is_read_in_its_own_dtype():
    model = tiny_model("llama")
    half = read_attention(model.to(torch.bfloat16))[0]
    one = half["layers.0.self_attn"]
    assert one.value.weight.dtype == torch.bfloat16 and max(one.errors.values()) == 0.0
    student = hybrid_from_teacher(model)
    assert student.mixer_list[0].in_proj.weight.dtype == torch.float32


def test_what_is_read_shares_the_teachers_memory():
    model = tiny_model("gpt2")  # whose query, key and value are one projection
    places = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for one in read_attention(model)[0].values():
        for part in reading.PARTS:
            assert getattr(one, part).weight.untyped_storage().data_ptr() in places


def test_reading_calls_attention_alone_and_is_fast():
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=1536, vocab_size=1000))
    model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.model.rotary_emb.inv_freq.copy_(torch.logspace(0, -4, 32))
    counts = {"mlp": 0}
    model.model.layers[0].mlp.register_forward_hook(lambda *_: counts.update(mlp=counts["mlp"] + 1))
    start = time.process_time()
    assert len(read_attention(model)[0]) == 30
    assert time.process_time() - start < 10 and counts["mlp"] <= 3

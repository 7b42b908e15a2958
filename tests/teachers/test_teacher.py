"""The teacher: outputs untouched, queries and keys true, whatever the family of language models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_teachers import GQA, IDS, PLAIN, SIZES, batch, left_padded, make, scaled_up
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    BertConfig,
    BertModel,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

from cab_hf.teachers import rotary
from cab_hf.teachers.attention_interface import register_recording
from cab_hf.teachers.teacher import Teacher, TeacherAttention, check_vocabularies


TEXT = {
    "llama": LlamaConfig(**GQA, attention_bias=True),
    "mistral": MistralConfig(**GQA, sliding_window=3),
    "qwen2": Qwen2Config(**GQA),
    "qwen3": Qwen3Config(**GQA, head_dim=12),
    "gemma3": Gemma3TextConfig(
        **GQA, head_dim=12, sliding_window=3, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi": PhiConfig(**PLAIN),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, **IDS),
    "gpt_neox": GPTNeoXConfig(**PLAIN),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
}
ROTARY = {name: TEXT[name] for name in ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi", "gpt_neox")} | {
    "yarn": LlamaConfig(
        **PLAIN,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 512,
        },
    ),
    "stablelm": StableLmConfig(**GQA),
    "cohere": CohereConfig(**GQA),
    "glm": GlmConfig(**GQA, head_dim=12),
    "smollm3": SmolLM3Config(**GQA, no_rope_layers=[1, 0]),
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
BART = {"d_model": 32, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
MORE_TEXT = {
    "bart": {**BART, "vocab_size": 99, "is_decoder": True, "is_encoder_decoder": False, **IDS},
    "cohere2": GQA,
    "deepseek_v3": {**PLAIN, **EXPERTS, **LATENT, "num_key_value_heads": 4},
    "gemma": {**GQA, "head_dim": 12},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, **IDS},
    "mixtral": {**GQA, "num_local_experts": 4},
    "olmo": GQA,
    "olmo2": GQA,
    "phi3": GQA,
    "qwen2_moe": {**GQA, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**GQA, **EXPERTS, "num_experts": 4, "head_dim": 8},
    "starcoder2": GQA,
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", TEXT)
def test_outputs_are_those_of_the_untouched_model(family, implementation):
    model = make(TEXT[family], implementation)
    untouched = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    teacher = Teacher(model)
    for inputs in (batch(), left_padded(batch(seed=1)), batch(length=1)):
        with torch.no_grad():
            expected = untouched(**inputs, output_hidden_states=True)
        output = teacher(inputs, attentions=True, hidden_states=True, logits=True)
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        assert torch.equal(output.logits[real], expected.logits[real])
        assert torch.equal(output.last_hidden_state[real], expected.hidden_states[-1][real])
        assert len(output.hidden_states) == 3
        for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(ours[real], theirs[real])
        assert torch.equal(teacher.head(output.last_hidden_state)[real], expected.logits[real])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", TEXT)
def test_attention_explains_its_output(family):
    """Softmax of the returned queries and keys weighs some values into the returned output."""
    config = TEXT[family]
    teacher = Teacher(make(config))
    inputs = batch()
    attentions = teacher(inputs, attentions=True).attentions
    maps = Teacher.restore(teacher)
    maps.set_attn_implementation("eager")
    with torch.no_grad():
        maps = maps(**inputs, output_attentions=True).attentions
    kv_heads = {"num_key_value_heads": 4, **config.to_dict()}["num_key_value_heads"]
    assert len(attentions) == teacher.num_hidden_layers == 2
    for layer, (query, key, output) in enumerate(attentions):
        assert query.shape == (2, 4, 7, teacher.head_dim)
        assert key.shape == (2, kv_heads, 7, teacher.head_dim)
        assert output.shape == (2, 7, 4, teacher.head_dim)
        scores = query @ key.repeat_interleave(4 // kv_heads, dim=1).mT * teacher.scalings[layer]
        allowed = maps[layer] > 0
        assert not allowed.all()
        torch.testing.assert_close(
            scores.masked_fill(~allowed, -torch.inf).softmax(-1), maps[layer], rtol=0, atol=1e-5
        )
    assert (teacher.num_attention_heads, teacher.num_key_value_heads, teacher.vocab_size) == (4, kv_heads, 99)
    assert teacher.query_sizes == (4 * teacher.head_dim,) * 2
    assert teacher.key_sizes == (kv_heads * teacher.head_dim,) * 2


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x, positions, theta, rotated):
    """x (b, h, t, p): the first `rotated` features in pairs of halves, written out."""
    frequencies = theta ** -(torch.arange(0, rotated, 2).double() / rotated)
    angle = positions[..., None].double() * frequencies
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b = x[..., : rotated // 2], x[..., rotated // 2 : rotated]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., rotated:]), dim=-1)


def test_llama_queries_and_keys_are_the_rotated_projections():
    model = make(TEXT["llama"])
    inputs = batch()
    output = Teacher(model)(inputs, attentions=True, hidden_states=True)
    for layer, block in enumerate(model.model.layers):
        x = rms_norm(output.hidden_states[layer], block.input_layernorm.weight, model.config.rms_norm_eps)
        query = F.linear(x, block.self_attn.q_proj.weight, block.self_attn.q_proj.bias)
        key = F.linear(x, block.self_attn.k_proj.weight, block.self_attn.k_proj.bias)
        value = F.linear(x, block.self_attn.v_proj.weight, block.self_attn.v_proj.bias)
        query, key, value = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in (query, key, value))
        query, key = (rotate(y, torch.arange(7), 10000.0, 8) for y in (query, key))
        torch.testing.assert_close(output.attentions[layer].query, query, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.attentions[layer].key, key, rtol=1e-4, atol=1e-5)
        key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
        scores = query @ key.mT * 8**-0.5
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        expected = (scores.softmax(-1) @ value).transpose(1, 2)
        torch.testing.assert_close(output.attentions[layer].output, expected, rtol=1e-4, atol=1e-5)


def test_gpt2_queries_and_keys_are_the_projections():
    model = make(TEXT["gpt2"])
    output = Teacher(model)(batch(), attentions=True, hidden_states=True)
    for layer, block in enumerate(model.transformer.h):
        x = F.layer_norm(output.hidden_states[layer], (32,), block.ln_1.weight, block.ln_1.bias, 1e-5)
        query, key, _ = (x @ block.attn.c_attn.weight + block.attn.c_attn.bias).split(32, dim=-1)
        for ours, theirs in ((output.attentions[layer].query, query), (output.attentions[layer].key, key)):
            torch.testing.assert_close(ours, theirs.unflatten(-1, (4, 8)).transpose(1, 2), rtol=1e-4, atol=1e-5)


def straight_projections(model, family, hidden, layer):
    """Query and key (b, h, t, p) of a layer before any rotation, computed by hand from its input."""
    config = model.config
    if family == "gpt_neox":
        block = model.gpt_neox.layers[layer]
        norm, attention = block.input_layernorm, block.attention
        x = F.layer_norm(hidden, (32,), norm.weight, norm.bias, config.layer_norm_eps)
        weight = attention.query_key_value.weight.view(4, 3, 8, 32)
        bias = attention.query_key_value.bias.view(4, 3, 8)
        return tuple(torch.einsum("btd,hpd->bhtp", x, weight[:, i]) + bias[:, i][None, :, None] for i in (0, 1))
    block = model.model.layers[layer]
    norm, attention = block.input_layernorm, block.self_attn
    if family == "phi":
        x = F.layer_norm(hidden, (32,), norm.weight, norm.bias, config.layer_norm_eps)
    else:
        x = rms_norm(hidden, norm.weight, config.rms_norm_eps)
    head_dim = attention.head_dim
    query, key = (p(x).unflatten(-1, (-1, head_dim)) for p in (attention.q_proj, attention.k_proj))
    if family == "qwen3":
        query = rms_norm(query, attention.q_norm.weight, config.rms_norm_eps)
        key = rms_norm(key, attention.k_norm.weight, config.rms_norm_eps)
    return query.transpose(1, 2), key.transpose(1, 2)


@pytest.mark.parametrize("family", ["llama", "phi", "gpt_neox", "qwen3", "smollm3", "yarn"])
@pytest.mark.parametrize("padded", [False, True])
def test_unrotated_keys_and_queries_are_the_projections(family, padded):
    model = make(ROTARY[family])
    teacher = Teacher(model, remove_rotary=True)
    inputs = left_padded(batch()) if padded else batch()
    if padded:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    output = teacher(inputs, attentions=True, hidden_states=True)
    for layer in range(2):
        query, key = straight_projections(model, family, output.hidden_states[layer], layer)
        torch.testing.assert_close(output.attentions[layer].query, query, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(output.attentions[layer].key, key, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ROTARY)
def test_unrotated_keys_do_not_depend_on_the_position(family):
    """One token repeated: in a model that knows positions by rotation only, all places look alike in all layers."""
    teacher = Teacher(make(ROTARY[family]), remove_rotary=True)
    inputs = {"input_ids": torch.full((1, 9), 5)}
    for query, key, _ in teacher(inputs, attentions=True).attentions:
        for x in (query, key):
            torch.testing.assert_close(x, x[:, :, :1].expand_as(x), rtol=1e-3, atol=1e-4)
    rotated = Teacher(teacher.restore())(inputs, attentions=True).attentions[0].key
    assert (rotated - rotated[:, :, :1]).abs().max() > 0.1


@pytest.mark.parametrize("family", [f for f in TEXT if f != "opt"])
def test_packed_documents_are_kept_apart(family):
    teacher = Teacher(make(TEXT[family]))
    tokens = batch()["input_ids"][:1]
    packed = teacher({"input_ids": tokens, "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2, 2]])}, attentions=True)
    parts = [teacher({"input_ids": part}, attentions=True) for part in tokens.split([3, 2, 2], dim=1)]
    apart = torch.cat([part.last_hidden_state for part in parts], dim=1)
    torch.testing.assert_close(packed.last_hidden_state, apart, rtol=1e-3, atol=1e-4)
    for layer in range(2):
        key = torch.cat([part.attentions[layer].key for part in parts], dim=2)
        torch.testing.assert_close(packed.attentions[layer].key, key, rtol=1e-3, atol=1e-4)


def test_packed_documents_that_would_leak_raise():
    packed = batch() | {"seq_idx": torch.zeros(2, 7, dtype=torch.int32)}
    with pytest.raises(ValueError, match="OPTForCausalLM.*attends across"):
        Teacher(make(TEXT["opt"]))(packed)
    with pytest.raises(ValueError, match="both seq_idx .* and attention_mask"):
        Teacher(make(TEXT["llama"]))(left_padded(packed))


class Synchronisations(TorchDispatchMode):
    """Fails where a tensor's value decides what the host does: on a GPU the host would wait for the device there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", TEXT)
def test_nothing_waits_for_the_device(family, implementation):
    teacher = Teacher(make(TEXT[family], implementation), remove_rotary=family in ROTARY)
    inputs = batch()
    with Synchronisations():
        teacher(inputs, attentions=True, logits=True)
    untouched = make(TEXT[family], implementation)
    if family in ("llama", "gpt_neox"):
        with pytest.raises(AssertionError), Synchronisations(), torch.no_grad():
            untouched(**inputs, use_cache=False)


def test_full_mask_still_takes_the_fast_causal_path(monkeypatch):
    """Without padding sdpa gets no mask, in captured graphs too."""
    masks = []
    sdpa = F.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        masks.append((attn_mask, kwargs["is_causal"]))
        return sdpa(*args, attn_mask=attn_mask, **kwargs)

    teacher = Teacher(make(TEXT["llama"]))
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    teacher(batch())
    assert masks == [(None, True), (None, True)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_cuda_graph_captures_the_call(family):
    teacher = Teacher(make(TEXT[family]), device="cuda", dtype=torch.bfloat16, remove_rotary=family in ROTARY)
    static = {"input_ids": batch()["input_ids"].cuda()}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            teacher(static, attentions=True, logits=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = teacher(static, attentions=True, logits=True)
    fresh = batch(seed=3)
    static["input_ids"].copy_(fresh["input_ids"])
    graph.replay()
    eager = teacher(fresh, attentions=True, logits=True)
    assert eager.logits.device.type == "cpu"
    torch.testing.assert_close(captured.logits.cpu(), eager.logits)
    for ours, theirs in zip(captured.attentions, eager.attentions, strict=True):
        torch.testing.assert_close(ours.key.cpu(), theirs.key)


def test_frozen_in_eval_and_outside_modules():
    model = make(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, attn_pdrop=0.5, resid_pdrop=0.5, **IDS))
    teacher = Teacher(model.train())
    assert not isinstance(teacher, torch.nn.Module)
    assert not model.training and not any(p.requires_grad for p in model.parameters())

    student = torch.nn.Linear(32, 32)
    student.teacher = teacher
    assert len(list(student.parameters())) == 2 and len(student.state_dict()) == 2
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    output = teacher(batch() | {"labels": batch()["input_ids"]}, attentions=True, logits=True)
    assert torch.equal(output.logits, teacher(batch(), logits=True).logits)
    # A target must be usable in an autograd graph, which inference tensors are not.
    prediction = student(output.last_hidden_state)
    (F.mse_loss(prediction, output.attentions[0].output.flatten(-2)) * prediction.sum()).backward()
    optimizer.step()
    assert not output.last_hidden_state.requires_grad and student.weight.grad.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_restore_gives_back_the_attention_implementation():
    for implementation in ("sdpa", "eager"):
        model = make(TEXT["llama"], implementation)
        teacher = Teacher(model)
        assert model.config._attn_implementation == f"cab_{implementation}"
        assert Teacher(model).restore() is model
        assert model.config._attn_implementation == implementation
        assert teacher.model is model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_own_dtype(family):
    model = make(TEXT[family])
    wide = Teacher(copy.deepcopy(model))(batch()).last_hidden_state
    teacher = Teacher(model, dtype=torch.bfloat16, remove_rotary=family == "llama")
    with torch.autocast("cpu", dtype=torch.float16):
        output = teacher(batch(), attentions=True, logits=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert output.logits.dtype == output.attentions[0].key.dtype == torch.bfloat16
    torch.testing.assert_close(output.last_hidden_state.float(), wide, rtol=0.1, atol=0.1)
    if family == "llama":
        # Frequencies are no weights: rounded, they would turn late positions by radians.
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_flash_attention_runs_under_its_own_name(monkeypatch):
    """The flash path finds its kernel by the name in the config, so the recording name must not reach it."""
    model = make(TEXT["llama"])
    expected = Teacher(copy.deepcopy(model))(batch(), attentions=True)
    seen = []

    def kernel(query, key, value, attention_mask, *, attn_implementation, softmax_scale, is_causal, **kwargs):
        seen.append((attn_implementation, attention_mask))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=softmax_scale, enable_gqa=True
        )
        return output.transpose(1, 2)

    def set_by_hand(self, name):
        self.config._attn_implementation = name

    monkeypatch.setattr("transformers.integrations.flash_attention._flash_attention_forward", kernel)
    # Set by hand: a machine without the kernel refuses the name.
    monkeypatch.setattr(type(model), "set_attn_implementation", set_by_hand)
    monkeypatch.setattr(type(model.model), "set_attn_implementation", set_by_hand)
    model.set_attn_implementation("flash_attention_2")
    teacher = Teacher(model)
    assert model.config._attn_implementation == register_recording("flash_attention_2")
    seen.clear()
    output = teacher(batch(), attentions=True)
    assert seen == [("flash_attention_2", None)] * 2
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)
    assert output.attentions[1].key.shape == (2, 2, 7, 8)


def test_scaled_or_capped_logits_have_no_plain_head():
    for config, implementation in (
        (GraniteConfig(**GQA, logits_scaling=3.0), "sdpa"),
        (Gemma2Config(**GQA, head_dim=12, sliding_window=3, final_logit_softcapping=2.0), "eager"),
        (CohereConfig(**GQA, logit_scale=0.5), "sdpa"),
    ):
        model = make(config, implementation)
        with torch.no_grad():
            expected = model(**batch()).logits
        teacher = Teacher(model)
        assert teacher.head is None
        output = teacher(batch(), attentions=True, logits=True)
        assert torch.equal(output.logits, expected) and output.last_hidden_state is None
        assert len(output.attentions) == 2
        assert teacher(batch()).last_hidden_state.shape == (2, 7, 32)


def test_model_without_head():
    torch.manual_seed(0)
    teacher = Teacher(LlamaModel(copy.deepcopy(TEXT["llama"])))
    assert teacher.head is None and teacher(batch()).last_hidden_state.shape == (2, 7, 32)
    with pytest.raises(ValueError, match="LlamaModel.*has no head"):
        teacher(batch(), logits=True)


@pytest.mark.parametrize("family", MORE_TEXT)
def test_more_families_teach(family):
    model = make(AutoConfig.for_model(family, **MORE_TEXT[family]))
    inputs = batch()
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
    teacher = Teacher(model)
    output = teacher(inputs, attentions=True, hidden_states=True, logits=True)
    assert torch.equal(output.logits, expected) and len(output.hidden_states) == 3
    for query, key, value in output.attentions:
        assert query.shape == (2, 4, 7, teacher.head_dim) and key.shape == (
            2,
            teacher.num_key_value_heads,
            7,
            teacher.head_dim,
        )
        assert value.shape[:3] == (2, 7, 4)
    assert teacher.has_logits and teacher.norms_last_hidden_state and teacher.num_hidden_layers == 2


def test_a_classifier_of_texts_gives_logits_and_a_span_finder_none():
    config = LlamaConfig(**(GQA | {"pad_token_id": None}), num_labels=3)
    teacher = Teacher(LlamaForSequenceClassification(config))
    row = {"input_ids": batch()["input_ids"][:1]}
    assert teacher.has_logits and teacher(row, logits=True).logits.shape == (1, 3)
    assert not Teacher(LlamaForQuestionAnswering(config)).has_logits


def test_bert():
    torch.manual_seed(0)
    model = scaled_up(BertModel(BertConfig(**PLAIN, max_position_embeddings=16)).eval())
    inputs = left_padded(batch())
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    output = Teacher(model)(inputs, attentions=True)
    assert torch.equal(output.last_hidden_state, expected)
    assert isinstance(output.attentions[1], TeacherAttention)
    assert output.attentions[1].output.shape == (2, 7, 4, 8)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_nothing_to_remove_raises(family):
    with pytest.raises(ValueError, match="remove_rotary=True, but .*rotary_emb"):
        Teacher(make(TEXT[family]), remove_rotary=True)


def test_unknown_rotation_raises(monkeypatch):
    monkeypatch.setattr(rotary, "LAYOUTS", [layout for layout in rotary.LAYOUTS if layout.pairs == "interleaved"])
    with pytest.raises(ValueError, match="no known layout undoes .* still depend on the position"):
        Teacher(make(TEXT["llama"]), remove_rotary=True)


class Tokenizer:
    def __init__(self, size, offset=0):
        self.vocab = {f"t{i + offset}": i for i in range(size)}

    def get_vocab(self):
        return self.vocab


def test_vocabularies(caplog):
    assert check_vocabularies(99, 99) == 99
    assert check_vocabularies(51200, 50295) == 50295
    assert check_vocabularies(151936, 151665 + 400) == 151936
    with pytest.raises(ValueError, match="student_vocab_size=32000 and teacher_vocab_size=50257 differ by 18257"):
        check_vocabularies(32000, 50257)
    for one, other in ((50, 1000), (1000, 50), (99, 99 + 128), (5000, 5128), (32000, 33000)):
        with pytest.raises(ValueError, match="more than padding explains"):
            check_vocabularies(one, other)
    assert check_vocabularies(99, 128) == 99
    assert check_vocabularies(3000, 100, Tokenizer(99), Tokenizer(99)) == 100
    with pytest.raises(ValueError, match="different tokenizers: 99 and 99 tokens, 198 entries"):
        check_vocabularies(99, 99, Tokenizer(99), Tokenizer(99, offset=1))
    with pytest.raises(ValueError, match="needs 99 rows, but student_vocab_size=90 and"):
        check_vocabularies(90, 99, Tokenizer(99), Tokenizer(99))

"""A student made from a teacher: its function with the teacher's attention put back, its projections without."""

import copy
import functools
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from cab_hf.models import CABMambaConfig, CABMambaForCausalLM, CABMambaForSequenceClassification
from cab_hf.models.mixers import UNIT_GATE
from cab_hf.teachers.teacher import Teacher
from cab_hf.transfer import (
    FAMILIES,
    calibrate_output_norm,
    copy_teacher_weights,
    fit_gate,
    fit_output_projection,
    student_config,
    student_from_teacher,
)


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 101, **IDS}
PLAIN = {**SIZES, "intermediate_size": 52}
GQA = {**PLAIN, "num_key_value_heads": 2}

TEACHERS = {
    "llama": LlamaConfig(**GQA, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**GQA, head_dim=10, tie_word_embeddings=True),
    "mistral": MistralConfig(**GQA, head_dim=6),
    "qwen2": Qwen2Config(**GQA),
    "qwen3": Qwen3Config(**GQA, head_dim=10),
    "smollm3": SmolLM3Config(**GQA, no_rope_layers=[1, 0, 1]),
    "gpt2": GPT2Config(n_embd=36, n_layer=3, n_head=6, n_positions=40, vocab_size=101, **IDS),
    "gpt2-scaled": GPT2Config(
        n_embd=36,
        n_layer=3,
        n_head=6,
        n_inner=50,
        n_positions=40,
        vocab_size=101,
        scale_attn_by_inverse_layer_idx=True,
        **IDS,
    ),
    "phi": PhiConfig(**(PLAIN | {"num_attention_heads": 3})),
    "gpt_neox": GPTNeoXConfig(**PLAIN),
    "gpt_neox-sequential": GPTNeoXConfig(**PLAIN, use_parallel_residual=False, attention_bias=False),
    "arcee": AutoConfig.for_model("arcee", **GQA, mlp_bias=True, attention_bias=True),
    "ernie4_5": AutoConfig.for_model("ernie4_5", **GQA, head_dim=6, use_bias=True),
    "exaone": AutoConfig.for_model("exaone", **GQA),
    "gemma": AutoConfig.for_model("gemma", **GQA, head_dim=10, attention_bias=True),
    "gemma3_text": AutoConfig.for_model(
        "gemma3_text",
        **GQA,
        head_dim=10,
        query_pre_attn_scalar=12,
        attention_bias=True,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "glm": AutoConfig.for_model("glm", **GQA, head_dim=10, attention_bias=True),
    "helium": AutoConfig.for_model("helium", **GQA, head_dim=6),
    "internlm3": AutoConfig.for_model("internlm3", **GQA),
    "ministral": AutoConfig.for_model("ministral", **GQA, head_dim=6),
    "ministral3": AutoConfig.for_model("ministral3", **GQA, head_dim=6),
    "olmo": AutoConfig.for_model("olmo", **GQA, attention_bias=True),
    "phi3": AutoConfig.for_model("phi3", **GQA),
    "seed_oss": AutoConfig.for_model("seed_oss", **GQA, head_dim=10, mlp_bias=True),
    "stablelm": AutoConfig.for_model("stablelm", **GQA, partial_rotary_factor=2 / 3),
    "stablelm-parallel": AutoConfig.for_model(
        "stablelm",
        **PLAIN,
        num_key_value_heads=6,
        partial_rotary_factor=2 / 3,
        use_qkv_bias=True,
        use_parallel_residual=True,
    ),
    "starcoder2": AutoConfig.for_model("starcoder2", **GQA),
}


def make(name, seed=0, auto=AutoModelForCausalLM, **changes):
    torch.manual_seed(seed)
    config = copy.deepcopy(TEACHERS[name])
    config.update(changes)
    model = auto.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * (0.15 if parameter.ndim > 1 else 0.4))
    return model


def batch(seed=0, length=11):
    return {"input_ids": torch.randint(3, 101, (2, length), generator=torch.Generator().manual_seed(seed))}


def left_padded(inputs):
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :4] = 0
    return inputs | {"attention_mask": mask}


def blocks_and_attention(model):
    kind = model.config.model_type
    base = model.base_model
    blocks = base.h if kind == "gpt2" else base.layers
    name = {"gpt2": "attn", "gpt_neox": "attention"}.get(kind, "self_attn")
    return blocks, [getattr(block, name) for block in blocks]


class AttentionAsMixer(nn.Module):
    """A teacher's attention where a mixer was, with the call of a mixer."""

    def __init__(self, attention, base):
        super().__init__()
        self.attention, self.base = [attention], [base]

    def forward(self, hidden_states, cache=None, attention_mask=None, seq_idx=None, output_projections=False):
        length = hidden_states.shape[1]
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        arguments = {"attention_mask": mask}
        if self.base[0].config.model_type != "gpt2":
            arguments["position_ids"] = torch.arange(length)[None]
            kind = (self.attention[0].layer_type,) if self.base[0].config.model_type == "gemma3_text" else ()
            arguments["position_embeddings"] = self.base[0].rotary_emb(hidden_states, arguments["position_ids"], *kind)
        return self.attention[0](hidden_states, **arguments)[0], (None, None, None, None)


@pytest.mark.parametrize("name", TEACHERS)
def test_with_the_teachers_attention_the_student_is_the_teacher(name):
    teacher = make(name)
    student = student_from_teacher(teacher)
    for block, attention in zip(student.backbone.layers, blocks_and_attention(teacher)[1], strict=True):
        block.mixer = AttentionAsMixer(attention, teacher.base_model)
    inputs = batch()
    with torch.no_grad():
        expected = teacher(**inputs).logits
        torch.testing.assert_close(student(**inputs, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.3


LABELS = {"id2label": {0: "no", 1: "so", 2: "yes"}, "label2id": {"no": 0, "so": 1, "yes": 2}}


# transformers has no classifier of texts of the other three
@pytest.mark.parametrize("name", [name for name in TEACHERS if name not in ("ernie4_5", "exaone", "internlm3")])
@torch.no_grad()
def test_a_classifier_of_texts_becomes_one(name, tmp_path):
    problem = "multi_label_classification" if name == "phi" else None
    teacher = make(name, auto=AutoModelForSequenceClassification, **LABELS, problem_type=problem)
    student = student_from_teacher(teacher, student_class=CABMambaForSequenceClassification)
    assert type(student) is CABMambaForSequenceClassification
    assert (student.config.num_labels, student.config.problem_type, student.config.pad_token_id) == (3, problem, 0)
    assert student.config.id2label == LABELS["id2label"] and student.config.label2id == LABELS["label2id"]
    assert student.score.weight.data_ptr() != teacher.score.weight.data_ptr()
    student.save_pretrained(tmp_path)
    loaded = CABMambaForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch()).logits, student(**batch()).logits)
    for block, attention in zip(student.backbone.layers, blocks_and_attention(teacher)[1], strict=True):
        block.mixer = AttentionAsMixer(attention, teacher.base_model)
    inputs = batch()
    inputs["input_ids"][0, 8:] = 0  # padding on the right, which attention that is causal never sees
    expected = teacher(**inputs).logits
    torch.testing.assert_close(student(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1


@torch.no_grad()
def test_a_classifier_with_labels_of_its_own():
    causal, teacher = make("llama"), make("llama", auto=AutoModelForSequenceClassification, **LABELS)
    build = functools.partial(student_from_teacher, student_class=CABMambaForSequenceClassification)
    for other in (causal, make("llama", auto=AutoModelForTokenClassification)):
        with pytest.raises(ValueError, match=rf"{type(other).__name__} has no classifier.*num_labels=2"):
            build(other)
    torch.manual_seed(3)
    student = build(causal, num_labels=5, mixer_type="mamba", num_hidden_layers=2, calibration_inputs=batch())
    assert student.score.weight.shape == (5, 36) and 0.01 < student.score.weight.std() < 0.03
    assert (student.config.num_hidden_layers, student.config.layer_mixer_types) == (2, ["mamba", "mamba"])
    assert torch.equal(student.backbone.embeddings.weight, causal.get_input_embeddings().weight)
    causal_student = student_from_teacher(causal)
    for name, weight in build(causal, id2label={0: "a", 1: "b"}).backbone.state_dict().items():
        assert torch.equal(weight, causal_student.backbone.state_dict()[name]), name
    # as many labels keep their names and weights, other numbers start anew
    same, more, named = build(teacher, num_labels=3), build(teacher, num_labels=4), build(teacher, id2label={0: "a"})
    assert torch.equal(same.score.weight, teacher.score.weight) and same.config.id2label == LABELS["id2label"]
    assert more.score.weight.shape == (4, 36) and more.score.weight.std() < 0.03
    assert named.config.id2label == {0: "a"} and named.score.weight.shape == (1, 36)
    assert build(teacher, dtype=torch.bfloat16).score.weight.dtype == torch.bfloat16
    random = build(teacher, copy_weights=False)
    assert random.config.id2label == LABELS["id2label"] and not torch.equal(random.score.weight, teacher.score.weight)
    unpadded = make("llama", auto=AutoModelForSequenceClassification, pad_token_id=None)
    assert build(unpadded, calibration_inputs=batch()).config.pad_token_id is None


def hidden_and_attention(teacher, inputs):
    """Normed input (b, t, d) of each layer's attention, and its unrotated query, key (b, t, h, p)."""
    normed = []
    handles = [
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: normed.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for attention in blocks_and_attention(teacher)[1]
    ]
    wrapped = Teacher(teacher, remove_rotary=teacher.config.model_type != "gpt2")
    normed.clear()
    attentions = wrapped(inputs, attentions=True).attentions
    for handle in handles:
        handle.remove()
    wrapped.restore()
    return normed, [(a.query.transpose(1, 2), a.key.transpose(1, 2)) for a in attentions], wrapped.scalings


def values(attention, x, kind, head_dim):
    """Values (b, t, h_kv, p), computed from the teacher's modules."""
    if kind == "gpt2":
        return attention.c_attn(x).chunk(3, dim=-1)[2].unflatten(-1, (-1, head_dim))
    if kind == "gpt_neox":
        return attention.query_key_value(x).unflatten(-1, (-1, 3, head_dim))[..., 2, :]
    if kind == "phi3":
        key_value = (attention.qkv_proj.out_features - attention.o_proj.in_features) // 2
        return attention.qkv_proj(x)[..., -key_value:].unflatten(-1, (-1, head_dim))
    return attention.v_proj(x).unflatten(-1, (-1, head_dim))


@pytest.mark.parametrize("name", TEACHERS)
@torch.no_grad()
def test_mixers_start_from_the_teachers_projections(name):
    teacher = make(name)
    kind, inputs = teacher.config.model_type, batch(seed=2)
    student = student_from_teacher(teacher)
    head_dim, heads = student.config.head_dim, student.config.num_heads
    normed, projections, scalings = hidden_and_attention(teacher, inputs)
    assert len(normed) == 3
    for index, block in enumerate(student.backbone.layers):
        attention = blocks_and_attention(teacher)[1][index]
        x, (query, key) = normed[index], projections[index]
        if kind in ("qwen3", "gemma3_text"):  # the norm's weight is copied, its division by the RMS can't be
            weights = [norm.weight + (kind == "gemma3_text") for norm in (attention.q_norm, attention.k_norm)]
            query = attention.q_proj(x).unflatten(-1, (-1, head_dim)) * weights[0]
            key = attention.k_proj(x).unflatten(-1, (-1, head_dim)) * weights[1]
        value = values(attention, x, kind, head_dim)
        _, mixed = block.mixer(x)
        repeats = heads // key.shape[2]
        assert mixed.B.shape == mixed.C.shape == (2, 11, heads, head_dim)
        torch.testing.assert_close(mixed.B, key.repeat_interleave(repeats, dim=2), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed.C, query * scalings[index], rtol=1e-4, atol=1e-5)
        width = heads * head_dim
        inner = block.mixer.convolve(block.mixer.in_proj(x)[..., width:-heads], None, None, None)[..., :width]
        expected = value.repeat_interleave(repeats, dim=2).flatten(-2)
        torch.testing.assert_close(inner, expected, rtol=1e-4, atol=1e-5)
        mixed_by_hand = moving_average(mixed.B, mixed.C, expected.unflatten(-1, (heads, -1)), index)
        normalised = mixed_by_hand * torch.rsqrt(
            mixed_by_hand.square().mean(-1, keepdim=True) + student.config.layer_norm_epsilon
        )
        torch.testing.assert_close(mixed.output, normalised.flatten(-2), rtol=1e-3, atol=1e-4)
    first = student(**inputs, output_projections=True).projections[0]
    torch.testing.assert_close(first.C, block_c(student, normed[0]), rtol=1e-4, atol=1e-5)
    if kind == "gpt2" and teacher.config.scale_attn_by_inverse_layer_idx:
        assert scalings == pytest.approx([6**-0.5, 6**-0.5 / 2, 6**-0.5 / 3])


@pytest.mark.parametrize("name", ["qwen2", "llama-tied", "gpt2"])
@torch.no_grad()
def test_a_silu_start_keeps_values_nearly_linear_and_the_biases_of_query_key_and_value(name):
    teacher, inputs = make(name), batch(seed=2)
    for _, attention in zip(range(3), blocks_and_attention(teacher)[1], strict=True):
        for parameter in attention.parameters():
            if parameter.dim() == 1:
                parameter.normal_(std=0.1)
    student, linear = student_from_teacher(teacher, start="served"), student_from_teacher(teacher)
    assert (student.config.conv_activation, student.config.use_bias) == ("silu", name == "gpt2")
    for block, plain, x in zip(
        student.backbone.layers, linear.backbone.layers, hidden_and_attention(teacher, inputs)[0], strict=True
    ):
        ours, theirs = block.mixer(x)[1], plain.mixer(x)[1]
        scale = plain.mixer.config.head_dim**-0.5
        torch.testing.assert_close(ours.B, F.silu(theirs.B * scale**0.5), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.C, F.silu(theirs.C / scale**0.5), rtol=1e-4, atol=1e-5)
        # Without its SiLU, which halves what is small, a mixer is the linear one's double.
        block.mixer.config = copy.deepcopy(block.mixer.config)
        block.mixer.config.conv_activation = None
        scans = [mixer.scan(mixer.stream_and_gate(x)[0])[0] for mixer in (block.mixer, plain.mixer)]
        torch.testing.assert_close(scans[0], 2 * scans[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("given", [True, False])
@torch.no_grad()
def test_a_fitted_gate_is_one_sign_and_has_no_effect(given):
    teacher = make("llama-tied")
    teacher.get_input_embeddings().weight.add_(1.0)  # what states have in common
    inputs = left_padded(batch(seed=4)) if given else None
    student = student_from_teacher(
        teacher, start="served", num_hidden_layers=2, layer_map=[0, 1], conv_activation=None
    )
    fit_gate(student, teacher, inputs, [0, 1])
    other = batch(seed=5)
    states = teacher(**other, output_hidden_states=True).hidden_states
    for block, hidden in zip(student.backbone.layers, states, strict=False):
        x, width = block.norm(hidden), student.config.mixer_width
        gate = block.mixer.stream_and_gate(x)[1]
        assert (gate == gate[..., :1]).all() and gate.min() > 0 and (gate / UNIT_GATE - 1).abs().mean() < 0.3
        with_gate = block.mixer(x)[1].output
        block.mixer.in_proj.bias = nn.Parameter(torch.zeros(len(block.mixer.in_proj.weight)))
        block.mixer.in_proj.bias[:width], block.mixer.in_proj.weight[:width] = UNIT_GATE, 0.0
        torch.testing.assert_close(with_gate, block.mixer(x)[1].output, rtol=0.1, atol=0.02)


def block_c(student, normed):
    return student.backbone.layers[0].mixer(normed)[1].C


def moving_average(B, C, x, index):
    """Linear attention of x (b, t, h, p) with a decay of exp(-1 / memory) a token and weight 1 / memory, by a loop."""
    heads = x.shape[2]
    memory = torch.logspace(torch.tensor(8.0).log10(), torch.tensor(512.0).log10(), heads)
    state = torch.zeros(x.shape[0], heads, x.shape[3], B.shape[3])
    outputs = []
    for t in range(x.shape[1]):
        state = (
            state * torch.exp(-1 / memory)[:, None, None]
            + torch.einsum("bhp,bhn->bhpn", x[:, t], B[:, t]) / (memory[:, None, None])
        )
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("name", "mixer_type"), [("llama", "mamba2"), ("gpt2", "mamba2"), ("phi", "mamba")])
@torch.no_grad()
def test_calibration_gives_the_outputs_the_teachers_size(name, mixer_type, padded):
    teacher = make(name)
    inputs = left_padded(batch(seed=4)) if padded else batch(seed=4)
    real = inputs.get("attention_mask", torch.ones(2, 11)).bool()
    wanted = [
        a.output[real].square().mean(dim=(0, 2)).sqrt()
        for a in Teacher(make(name))(inputs, attentions=True).attentions
    ]
    student = student_from_teacher(teacher, mixer_type=mixer_type, calibration_inputs=inputs)
    seen = []
    for block in student.backbone.layers:
        block.mixer.register_forward_hook(lambda mixer, args, output: seen.append((mixer, output)))
    student(**inputs, use_cache=False)
    before = student_from_teacher(teacher, mixer_type=mixer_type)
    for index, (mixer, (_, projections)) in enumerate(seen):
        y = projections.output.unflatten(-1, (student.config.num_heads, -1))[real]
        rms = y.square().mean(dim=(0, 2)).sqrt()
        if mixer_type == "mamba":  # no norm: the scale sits in the output projection's columns
            ratio = mixer.out_proj.weight / before.backbone.layers[index].mixer.out_proj.weight
            rms = rms * ratio.unflatten(-1, (student.config.num_heads, -1)).mean(dim=(0, 2))
        torch.testing.assert_close(rms, wanted[index], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_calibration_of_a_student_that_shares_nothing_but_the_shape():
    teacher, inputs = make("llama"), batch()
    wanted = [
        a.output.square().mean(dim=(0, 1, 3)) for a in Teacher(make("llama"))(inputs, attentions=True).attentions
    ]
    torch.manual_seed(0)
    shared = student_from_teacher(
        teacher, copy_attention=False, n_groups=2, num_hidden_layers=2, layer_map=[2, 0], calibration_inputs=inputs
    )
    other = student_from_teacher(
        teacher, copy_weights=False, expand=25 / 36, num_heads=5, head_dim=5, n_groups=1, calibration_inputs=inputs
    )
    for student, layers, heads in ((shared, (2, 0), 6), (other, (0, 1, 2), 1)):
        projections = student(**inputs, output_projections=True).projections
        for projection, layer in zip(projections, layers, strict=True):
            energy = projection.output.unflatten(-1, (heads, -1)).square().mean(dim=(0, 1, 3))
            torch.testing.assert_close(energy, wanted[layer].unflatten(0, (heads, -1)).mean(-1), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "phi"])
def test_student_round_trip(name, tmp_path):
    teacher = make(name)
    teacher.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=2)
    student = student_from_teacher(teacher, calibration_inputs=batch())
    student.save_pretrained(tmp_path)
    loaded = CABMambaForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 7
    tied = loaded.lm_head.weight is loaded.backbone.embeddings.weight
    assert tied == teacher.config.tie_word_embeddings
    for key, value in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, student(**batch()).logits)
    rebuilt = CABMambaForCausalLM(CABMambaConfig.from_pretrained(tmp_path))
    rebuilt.load_state_dict(student.state_dict(), strict=True)


def test_fewer_layers_take_the_mapped_ones():
    teacher = make("llama")
    for kind, expected in (("floor", [0, 1]), ("last", [0, 2]), ([2, 1], [2, 1])):
        student = student_from_teacher(teacher, num_hidden_layers=2, layer_map=kind)
        for block, layer in zip(student.backbone.layers, expected, strict=True):
            assert torch.equal(block.mlp.down_proj.weight, teacher.model.layers[layer].mlp.down_proj.weight)
            assert torch.equal(block.norm.weight, teacher.model.layers[layer].input_layernorm.weight)
            assert torch.equal(block.mixer.out_proj.weight, teacher.model.layers[layer].self_attn.o_proj.weight)
    deeper = student_from_teacher(teacher, num_hidden_layers=5)
    assert torch.equal(deeper.backbone.layers[4].norm.weight, teacher.model.layers[2].input_layernorm.weight)


@pytest.mark.parametrize("mixer_type", ["mamba", "mamba2"])
def test_teacher_is_neither_changed_nor_shared(mixer_type):
    for name in TEACHERS:
        teacher = make(name).train()
        next(teacher.parameters()).requires_grad_(False)
        flags = [parameter.requires_grad for parameter in teacher.parameters()]
        before, implementation = copy.deepcopy(teacher.state_dict()), teacher.config._attn_implementation
        student = student_from_teacher(teacher, mixer_type=mixer_type, calibration_inputs=batch())
        storages = {parameter.untyped_storage().data_ptr() for parameter in teacher.parameters()}
        for parameter in student.parameters():
            assert parameter.untyped_storage().data_ptr() not in storages
            assert parameter.requires_grad
            parameter.data.add_(1.0)
        student.generation_config.max_new_tokens = 3
        assert teacher.training and all(module.training for module in teacher.modules())
        assert flags == [parameter.requires_grad for parameter in teacher.parameters()]
        assert teacher.config._attn_implementation == implementation
        assert teacher.generation_config.max_new_tokens != 3
        assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_s6_takes_values_and_outputs():
    teacher = make("llama")
    student = student_from_teacher(teacher, mixer_type="mamba")
    assert student.config.state_size == 16
    for block, layer in zip(student.backbone.layers, teacher.model.layers, strict=True):
        x = torch.randn(2, 5, 36)
        value = layer.self_attn.v_proj(x).unflatten(-1, (2, 6)).repeat_interleave(3, dim=2).flatten(-2)
        torch.testing.assert_close(block.mixer.in_proj(x)[..., :36], value)
        assert torch.equal(block.mixer.out_proj.weight, layer.self_attn.o_proj.weight)
        assert F.silu(block.mixer.in_proj(x)[..., 36:]).sub(1).abs().max() < 1e-5


def test_what_is_copied_can_be_chosen():
    teacher = make("gpt2")
    torch.manual_seed(0)
    student = student_from_teacher(teacher, copy_attention=False)
    assert torch.equal(student.backbone.layers[1].mlp.up_proj.weight, teacher.transformer.h[1].mlp.c_fc.weight.T)
    assert not torch.equal(
        student.backbone.layers[1].mixer.out_proj.weight, teacher.transformer.h[1].attn.c_proj.weight.T
    )
    random = student_from_teacher(teacher, copy_weights=False)
    assert random.config.to_dict() == student.config.to_dict()
    assert not torch.equal(random.backbone.embeddings.weight, teacher.transformer.wte.weight)


def test_wider_states_start_as_if_they_were_not_there():
    teacher, inputs = make("llama"), batch()
    narrow, wide = student_from_teacher(teacher), student_from_teacher(teacher, state_size=9)
    with torch.no_grad():
        torch.testing.assert_close(wide(**inputs).logits, narrow(**inputs).logits, rtol=1e-4, atol=1e-4)
    wide(**inputs, labels=inputs["input_ids"]).loss.backward()
    mixer = wide.backbone.layers[0].mixer
    extra = mixer.in_proj.weight.grad[72 : 72 + 54].view(6, 9, 36)[:, 6:]
    assert extra.abs().sum() > 0


def test_config_follows_the_teacher_and_overrides():
    config = student_config(TEACHERS["gpt2"])
    assert (config.max_position_embeddings, config.norm_type, config.hidden_act) == (40, "layer_norm", "gelu_new")
    assert (config.intermediate_size, config.gated_mlp, config.tie_word_embeddings) == (144, False, True)
    assert (config.n_groups, config.state_size, config.head_dim, config.conv_activation) == (6, 6, 6, None)
    assert student_config(TEACHERS["gpt2"], start="served").conv_activation == "silu"
    for options in ({"start": "served", "mixer_type": "mamba"}, {"start": "quick"}):
        with pytest.raises(ValueError, match="start is .* must be 'linear' or 'served'"):
            student_config(TEACHERS["gpt2"], **options)
    config = student_config(TEACHERS["phi"], transition_init="identity", conv_activation="silu")
    assert (config.parallel_residual, config.shared_norm, config.lm_head_bias) == (True, True, True)
    assert (config.transition_init, config.conv_activation) == ("identity", "silu")
    assert student_config(TEACHERS["llama-tied"]).expand == pytest.approx(60 / 36)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)


def test_dtype():
    student = student_from_teacher(make("llama"), dtype=torch.bfloat16)
    assert student.backbone.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    assert student.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert student.config.dtype == torch.bfloat16
    assert torch.isfinite(student(**batch()).logits).all()
    double = student_from_teacher(make("llama").double())
    assert {parameter.dtype for parameter in double.parameters()} == {torch.float32}


def test_errors_teach():
    teacher = AutoModelForCausalLM.from_config(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=36))
    with pytest.raises(ValueError, match="'opt'.*'gpt2', 'gpt_neox', .*'llama'.*CABMambaConfig"):
        student_from_teacher(teacher, student_class=CABMambaForCausalLM)
    with pytest.raises(ValueError, match="add_cross_attention"):
        student_config(GPT2Config(add_cross_attention=True))
    for kind in ("phi", "stablelm"):
        with pytest.raises(ValueError, match=r"is not linear at 'layers.\d.self_attn'.* off by \d+\.\d%"):
            student_from_teacher(make(kind, qk_layernorm=True))
    with pytest.raises(ValueError, match=r"final_logit_softcapping is 30\.0"):
        student_config(AutoConfig.for_model("gemma3_text", final_logit_softcapping=30.0))
    with pytest.raises(ValueError, match="student and teacher has layers.0.post_norm.*post_norms"):
        student_from_teacher(make("gemma3_text"), post_norms=False)
    teacher = make("llama")
    with pytest.raises(ValueError, match="student and teacher has layers.0.post_norm.*post_norms"):
        student_from_teacher(teacher, post_norms=True)
    with pytest.raises(
        ValueError, match="n_groups=2 and state_size=6, the teacher 6 query heads.*copy_attention=False"
    ):
        student_from_teacher(teacher, n_groups=2)
    with pytest.raises(ValueError, match="state_size=4, the teacher"):
        student_from_teacher(teacher, state_size=4)
    with pytest.raises(ValueError, match=r"of 72 in heads of 6, the teacher's attention one of 36"):
        student_from_teacher(teacher, expand=2, num_heads=12, n_groups=12)
    with pytest.raises(ValueError, match=r"mlp.gate_proj.weight is \(40, 36\), the teacher's is \(52, 36\)"):
        student_from_teacher(teacher, intermediate_size=40)
    with pytest.raises(ValueError, match="gated_mlp"):
        student_from_teacher(teacher, gated_mlp=False)
    with pytest.raises(ValueError, match="tie_word_embeddings=False"):
        student_from_teacher(teacher, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="out_proj.bias, but the student has none.*use_bias"):
        student_from_teacher(teacher, start="served", use_bias=False)
    with pytest.raises(ValueError, match="CABMambaConfig has no field 'stat_size'. Did you mean 'state_size'?"):
        student_from_teacher(teacher, stat_size=8)
    with pytest.raises(ValueError, match="lists 1 teacher layers for 3"):
        student_from_teacher(teacher, layer_map=[0])


def mixer_errors(student, teacher, inputs):
    """Squared error of each mixer against the teacher's attention on the teacher's hidden states, padding left out."""
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    seen, errors = [], []
    handles = [
        attention.register_forward_hook(
            lambda module, args, kwargs, output: seen.append(
                (args[0] if args else kwargs["hidden_states"], output[0])
            ),
            with_kwargs=True,
        )
        for attention in blocks_and_attention(teacher)[1]
    ]
    teacher(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    for block, (x, target) in zip(student.backbone.layers, seen, strict=True):
        errors.append((block.mixer(x, None, inputs.get("attention_mask"))[0] - target)[real].square().mean())
    return torch.stack(errors)


@pytest.mark.parametrize(("name", "mixer_type"), [("llama", "mamba2"), ("gpt2", "mamba2"), ("gpt_neox", "mamba")])
@torch.no_grad()
def test_fitted_output_projections_minimise_the_error(name, mixer_type):
    teacher, inputs = make(name), left_padded(batch(seed=5, length=40))
    student = student_from_teacher(teacher, mixer_type=mixer_type, calibration_inputs=inputs)
    before = copy.deepcopy(student.state_dict())
    start = mixer_errors(student, teacher, inputs)
    fit_output_projection(student, teacher, [inputs], ridge=1e12)
    for key, value in student.state_dict().items():  # pulled back all the way, but for the free bias
        assert "out_proj.bias" in key or torch.allclose(value, before[key], atol=1e-6), key
    student.load_state_dict(before)
    fit_output_projection(student, teacher, [inputs], ridge=0.3)
    pulled = mixer_errors(student, teacher, inputs)
    fit_output_projection(student, teacher, [inputs], ridge=0.0)
    best = mixer_errors(student, teacher, inputs)
    assert (best < pulled).all() and (pulled < 0.9 * start).all()
    # A minimum: no small step in any direction does better.
    generator = torch.Generator().manual_seed(0)
    for block in student.backbone.layers:
        weight = block.mixer.out_proj.weight
        weight.add_(torch.randn(weight.shape, generator=generator) * 1e-2 * weight.std())
    assert (mixer_errors(student, teacher, inputs) > best).all()
    changed = {key for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
    assert all("out_proj" in key for key in changed)


@torch.no_grad()
def test_fit_adds_up_batches_and_ignores_padding():
    teacher, inputs = make("llama"), left_padded(batch(seed=6, length=20))
    whole, parts = (student_from_teacher(teacher) for _ in range(2))
    fit_output_projection(whole, teacher, [inputs])
    noisy = inputs | {"input_ids": inputs["input_ids"].where(inputs["attention_mask"].bool(), torch.tensor(7))}
    fit_output_projection(parts, teacher, ({key: value[i : i + 1] for key, value in noisy.items()} for i in range(2)))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="batches is empty"):
        fit_output_projection(whole, teacher, [])
    with pytest.raises(ValueError, match="ridge is -1"):
        fit_output_projection(whole, teacher, [inputs], ridge=-1)


def test_heads_of_another_width_are_refused_or_mean_nothing():
    teacher = make("llama")  # 6 heads of 6, whose values are grouped
    with pytest.raises(ValueError, match="in heads of 12, the teacher's .* in heads of 6. Leave expand and head_dim"):
        student_from_teacher(teacher, head_dim=12, num_heads=3, n_groups=3)
    usual, other = (student_from_teacher(teacher, mixer_type="mamba", **fields) for fields in ({}, WIDE))
    for ours, theirs in zip(usual.mixer_list, other.mixer_list, strict=True):  # an S6 mixer has no heads
        assert torch.equal(ours.in_proj.weight[:36], theirs.in_proj.weight[:36])


WIDE = {"head_dim": 12, "num_heads": 3, "n_groups": 3}


def test_steps_work_alone():
    teacher = make("gpt_neox")
    student = CABMambaForCausalLM(
        student_config(teacher.config, start="served", use_bias=True)
    )  # GPT-NeoX's attention has them
    copy_teacher_weights(student, teacher, [0, 1, 2])
    fit_gate(student, teacher, batch())
    calibrate_output_norm(student, teacher, batch())
    whole = student_from_teacher(teacher, start="served", calibration_inputs=batch())
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in student.state_dict().items())
    assert {name.split("-")[0] for name in TEACHERS} == set(FAMILIES)


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.isdir(os.environ.get("CAB_TEST_TEACHER", "")), reason="CAB_TEST_TEACHER names no folder of a teacher"
)
@torch.no_grad()
def test_real_teacher():
    folder = os.environ["CAB_TEST_TEACHER"]
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "The president of the United States addressed the Congress. " * 8
    inputs = {"input_ids": tokenizer(text, return_tensors="pt").input_ids}
    student = student_from_teacher(teacher, calibration_inputs=inputs)
    loss = student(**inputs, labels=inputs["input_ids"]).loss
    assert torch.isfinite(loss) and loss < 0.9 * torch.tensor(teacher.config.vocab_size).log()

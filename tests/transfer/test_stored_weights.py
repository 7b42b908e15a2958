"""Weights as a teacher stores them: in codes, offloaded, under a composite config; a student takes their values."""

import functools
import importlib.util

import accelerate
import pytest
import torch
from tiny_distillation import NO_LOSS, make_arguments, ragged_rows, tiny_student, tiny_teacher
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    TorchAoConfig,
    ViTConfig,
)

from cab_hf import DistillationTrainer
from cab_hf.data.packing import LanguageCollator
from cab_hf.models import CABMambaConfig, CABMambaForCausalLM
from cab_hf.recipes import ModelArguments
from cab_hf.runs.student import build_student
from cab_hf.teachers.recorded_teacher import record_teacher
from cab_hf.teachers.teacher import Teacher
from cab_hf.transfer import calibrate_output_norm, fit_output_projection, student_from_teacher


SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGES = {"image_size": 8, "patch_size": 4, "num_labels": 32}
CONFIGS = {
    "llama": LlamaConfig(**WIDE),
    "gpt2": GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=32),
    "gpt_neox": GPTNeoXConfig(**WIDE),
    "phi3": Phi3Config(**WIDE),
    "vit": ViTConfig(**{name: value for name, value in WIDE.items() if name != "vocab_size"}, **IMAGES),
}
IDS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))
has = {name: importlib.util.find_spec(name) is not None for name in ("bitsandbytes", "torchao")}


def auto_of(name):
    return AutoModelForImageClassification if name == "vit" else AutoModelForCausalLM


def saved(name, path):
    torch.manual_seed(0)
    model = auto_of(name).from_config(CONFIGS[name]).eval()
    model.save_pretrained(path)
    return model


def inputs_of(name):
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels} if name == "vit" else {"input_ids": IDS}


class Coded(nn.Module):
    """A projection as GPTQ and AWQ keep it: codes under another name, and no weight at all."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, linear.out_features))
        self.bias = linear.bias


def in_bytes(dtype):
    def replace(linear):
        linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        linear.weight_scale_inv = torch.ones(1, 1)
        return linear

    return replace


LAYOUTS = {
    "fp8": in_bytes(torch.float8_e4m3fn),
    "fp8 e5m2": in_bytes(torch.float8_e5m2),
    "int8": in_bytes(torch.int8),
    "packed in uint8": in_bytes(torch.uint8),
    "gptq, awq": Coded,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi3", "vit"])
def test_codes_are_never_copied(name, layout, tmp_path):
    teacher = saved(name, tmp_path)
    inside = teacher.base_model.layers
    for path, module in list(inside.named_modules()):
        if type(module) is nn.Linear:
            parent, _, child = path.rpartition(".")
            setattr(inside.get_submodule(parent), child, LAYOUTS[layout](module))
    with pytest.raises(ValueError, match=r"is quantised \(`quantization_config`\).*dequantize.*copy_weights=False"):
        student_from_teacher(teacher)
    assert student_from_teacher(teacher, copy_weights=False).config.num_hidden_layers == 2


@torch.no_grad()
@pytest.mark.parametrize("runs_first", [False, True])
@pytest.mark.parametrize(
    ("bits", "most"),
    [
        pytest.param(8, 0.02, marks=pytest.mark.skipif(not has["bitsandbytes"], reason="bitsandbytes is missing")),
        pytest.param(4, 0.3, marks=pytest.mark.skipif(not has["bitsandbytes"], reason="bitsandbytes is missing")),
        pytest.param("ao", 0.02, marks=pytest.mark.skipif(not has["torchao"], reason="torchao is missing")),
    ],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_quantised_values_are_read(name, bits, most, runs_first, tmp_path):
    options = {} if name == "vit" else {"tie_word_embeddings": False}
    right = student_from_teacher(saved(name, tmp_path), **options).state_dict()
    if bits == "ao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_compute_dtype=torch.float32)
    teacher = auto_of(name).from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    inputs = inputs_of(name)
    if runs_first:
        teacher(**inputs)
    got = student_from_teacher(teacher, **options).state_dict()
    student = student_from_teacher(teacher, calibration_inputs=inputs, **options)
    fit_output_projection(student, teacher, [inputs])
    assert all(parameter.isfinite().all() for parameter in student.parameters())
    coded = [key for key in right if "mlp" in key and key.endswith("weight") and "norm" not in key]
    for key in coded:
        assert (got[key] - right[key]).norm() / right[key].norm() < most, key
    with pytest.raises(ValueError, match="is quantised.*`teacher_dtype`"):
        Teacher(teacher, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.skipif(not has[kind], reason=f"{kind} is missing"))
        for kind in ("bitsandbytes", "torchao")
    ],
)
def test_quantised_teachers_are_recorded_by_their_bytes(kind, tmp_path):
    saved("llama", tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True)
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    rows = [{"input_ids": row} for row in IDS.tolist()]
    if kind == "torchao":
        with pytest.raises(ValueError, match="quantised by torchao"):
            recorded(teacher, rows, tmp_path / "record")
    else:
        assert recorded(teacher, rows, tmp_path / "record").vocab_size == 64


def on_disk(path):
    places = dict.fromkeys(("embed_tokens", "norm", "rotary_emb", "layers.0"), "cpu") | {"layers.1": "disk"}
    device_map = {f"model.{name}": place for name, place in places.items()} | {"lm_head": "cpu"}
    return AutoModelForCausalLM.from_pretrained(path, device_map=device_map, offload_folder=path / "offloaded")


def hooked(path, auto=AutoModelForCausalLM):
    model = auto.from_pretrained(path)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def recorded(teacher, rows, path):
    return record_teacher(Teacher(teacher), rows, path, data_collator=LanguageCollator(0), top_k=4)


def test_offloaded_weights_are_said_to_be_so(tmp_path):
    whole = saved("llama", tmp_path / "text")
    saved("vit", tmp_path / "images")
    student = student_from_teacher(whole)
    rows = [{"input_ids": row} for row in IDS.tolist()]
    for teacher in (on_disk(tmp_path / "text"), hooked(tmp_path / "text")):
        for use, *given in (
            (student_from_teacher, teacher),
            (functools.partial(student_from_teacher, copy_weights=False), teacher),
            (fit_output_projection, student, teacher, [{"input_ids": IDS}]),
            (recorded, teacher, rows, tmp_path / "record"),
            (DistillationTrainer, student, teacher, make_arguments(tmp_path)),
        ):
            with pytest.raises(ValueError, match="The teacher's weights, such as .* are offloaded.*`device_map`"):
                use(*given)
    calibrate_output_norm(student, on_disk(tmp_path / "text"), {"input_ids": IDS})  # asks, and reads no weights
    with pytest.raises(ValueError, match="are offloaded"):
        student_from_teacher(hooked(tmp_path / "images", AutoModelForImageClassification))


def test_a_name_of_nothing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'some/model' is no folder of a model .* Name a folder or a Hub id"):
        student_from_teacher("some/model")
    with pytest.raises(ValueError, match="There is no folder some/student, and the Hub gave no model of that name"):
        DistillationTrainer("some/student", tiny_teacher(), make_arguments(tmp_path))


@pytest.mark.parametrize("given", [None, Teacher])
def test_what_is_no_model_is_named(given, tmp_path):
    given = Teacher(AutoModelForCausalLM.from_config(CONFIGS["llama"])) if given is Teacher else given
    student = tiny_student()
    with pytest.raises(ValueError, match=r"The teacher is .*not a model.*from_pretrained"):
        student_from_teacher(given)
    with pytest.raises(ValueError, match=r"The teacher is .*not a model.*from_pretrained"):
        fit_output_projection(student, given, [])
    with pytest.raises(ValueError, match=r"The student is .*not a model.*from_pretrained"):
        DistillationTrainer(given, student, make_arguments(tmp_path, **NO_LOSS | {"ce_weight": 1.0}))


TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}
GEMMA = {**WIDE, "num_key_value_heads": 2, "head_dim": 16}


def gemma3():
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 63, "boi_token_index": 61, "eoi_token_index": 62}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=GEMMA, vision_config=TOWER, **tokens))


def llava():
    tower = TOWER | {"model_type": "clip_vision_model", "projection_dim": 16}
    text = {**WIDE, "model_type": "llama", "tie_word_embeddings": False}
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_index=63)
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize(("make", "text_class"), [(gemma3, Gemma3ForCausalLM), (llava, None)])
def test_a_composite_config_gives_its_language_models_student(make, text_class):
    torch.manual_seed(0)
    teacher = make().eval()
    text = teacher.config.get_text_config()
    alone = AutoModelForCausalLM.from_config(text).eval()
    alone.base_model.load_state_dict(teacher.get_decoder().state_dict())
    alone.lm_head.load_state_dict(teacher.lm_head.state_dict())
    options = {"tie_word_embeddings": False}
    got, right = (student_from_teacher(one, **options) for one in (teacher, alone))
    filled = [student_from_teacher(one, calibration_inputs={"input_ids": IDS}, **options) for one in (teacher, alone)]
    for one in filled:
        fit_output_projection(one, teacher if one is filled[0] else alone, [{"input_ids": IDS}])
    for ours, theirs in ((got, right), filled):
        copied = [name for name, _ in theirs.named_parameters() if "mlp" in name or "embeddings" in name]
        copied += ["backbone.norm_f.weight", "lm_head.weight"]
        for name in copied:
            assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name)), name
    assert got.config.vocab_size == 64 and got.config.bos_token_id == 1
    own = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    model = ModelArguments(teacher="x", student_from="config", student_config=own)
    assert build_student(model, teacher, "floor", []).config.vocab_size == 64


def test_a_composite_teacher_teaches(tmp_path):
    torch.manual_seed(0)
    teacher = gemma3().eval()
    student = CABMambaForCausalLM(CABMambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, head_dim=8))
    trainer = DistillationTrainer(student, teacher, make_arguments(tmp_path), train_dataset=ragged_rows())
    assert trainer.train().training_loss > 0

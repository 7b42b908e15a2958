"""Students as stock models and back, and as ONNX: equal logits, equal texts, and a reason wherever it can't be."""

import copy
import json

import pytest
import torch
from tiny_distillation import tiny_teacher
from tiny_models import VARIANTS, largest_difference, random_ids, random_images, shake, tiny_model, tiny_vision_model
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeHybridForCausalLM,
    Mamba2ForCausalLM,
    MambaForCausalLM,
)

from cab_hf.export.loading import read_student
from cab_hf.export.onnx import export_onnx, to_program
from cab_hf.export.stock import export_stock, to_stock
from cab_hf.transfer import student_from_teacher


SSD = {"mixer_type": "mamba2", "n_groups": 2}
MLP = {"intermediate_size": 24}
LINEAR = {"conv_activation": None, "use_bias": True}
CASES = {
    "s6": (MambaForCausalLM, {"mixer_type": "mamba"}),
    "s6, odd sizes": (MambaForCausalLM, {"mixer_type": "mamba", "time_step_rank": 3, "use_bias": True, "expand": 3}),
    "s6, linear": (MambaForCausalLM, {"mixer_type": "mamba", **LINEAR, "tie_word_embeddings": False}),
    "ssd": (Mamba2ForCausalLM, SSD),
    "ssd, linear": (Mamba2ForCausalLM, {**SSD, **LINEAR}),
    "granite": (GraniteMoeHybridForCausalLM, {**SSD, **MLP, "expand": 2.0, "use_conv_bias": False}),
    "granite, one head a group": (GraniteMoeHybridForCausalLM, {**SSD, **MLP, "n_groups": 8, "use_bias": True}),
    "granite, linear": (GraniteMoeHybridForCausalLM, {**SSD, **MLP, **LINEAR}),
    "granite, linear, untied, large epsilon": (
        GraniteMoeHybridForCausalLM,
        {**SSD, **MLP, **LINEAR, "tie_word_embeddings": False, "layer_norm_epsilon": 0.1},
    ),
}
# With biases, a stock class's convolution sees them at padding.
LEFT_PADDED = [name for name, (_, settings) in CASES.items() if not settings.get("use_bias")]


def logits(model, ids, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits


@pytest.mark.parametrize("case", CASES)
def test_logits_and_texts_are_equal(case):
    expected, settings = CASES[case]
    student, ids = tiny_model(**settings), random_ids(2, 11)
    stock = to_stock(student)
    assert type(stock) is expected and not stock.training
    assert largest_difference(logits(stock, ids), logits(student, ids)) < 2e-5
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(stock.generate(ids, **greedy), student.generate(ids, **greedy))


@pytest.mark.parametrize("case", LEFT_PADDED)
def test_left_padded_rows_are_equal(case):
    student, ids = tiny_model(**CASES[case][1]), random_ids(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, :6] = 0, 0
    pair = [logits(model, ids, attention_mask=mask)[mask.bool()] for model in (to_stock(student), student)]
    assert largest_difference(*pair) < 2e-5


def test_the_export_leaves_the_student_as_it_was_and_copies_its_generation_config():
    student = tiny_model(**CASES["granite, linear"][1])
    student.generation_config.max_new_tokens = 7
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    stock = to_stock(student)
    assert stock.generation_config.max_new_tokens == 7
    with torch.no_grad():
        stock.lm_head.weight.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_compact_states_keep_their_width_and_lose_little():
    student, ids = tiny_model(**{**SSD, **LINEAR}), random_ids(2, 11)
    paired, compact = to_stock(student), to_stock(student, compact=True)
    assert (paired.config.state_size, compact.config.state_size) == (12, 6)
    expected = logits(student, ids)
    error = largest_difference(logits(compact, ids), expected)
    assert largest_difference(logits(paired, ids), expected) < error < 3e-4 * float(expected.abs().max())


def test_bfloat16_stock_is_as_near_as_the_student_in_bfloat16():
    student, ids = tiny_model(**CASES["granite, linear"][1]), random_ids(2, 11)
    expected = logits(student, ids)
    stock = to_stock(student).to(torch.bfloat16)
    errors = [float((logits(model, ids).float() - expected).std()) for model in (stock, student.to(torch.bfloat16))]
    assert errors[0] < 1.5 * errors[1]
    assert to_stock(student).dtype == torch.bfloat16


REFUSED = {
    "s6 untied, biases": ["lm_head_bias"],
    "s6 positions, plain mlp": ["S6", "norm_type", "40 learned positions", "gated_mlp", "'gelu'"],
    "ssd 2 groups, gated mlp": ["'gelu'"],
    "ssd parallel, shared norm": ["parallel_residual", "norm_type", "learned positions"],
    "ssd post norms, scaled embeddings": ["post_norms"],
    "mixed": ["layers [1]", "S6"],
}


@pytest.mark.parametrize("variant", REFUSED)
def test_every_reason_against_a_stock_class_is_named(variant):
    with pytest.raises(ValueError) as raised:
        to_stock(tiny_model(**VARIANTS[variant]))
    assert all(reason in str(raised.value) for reason in REFUSED[variant]), raised.value


def test_odd_widths_float16_and_image_students_are_refused():
    with pytest.raises(ValueError, match=r"expand=1\.5 times hidden_size=32"):
        to_stock(tiny_model(**SSD, expand=1.5))
    with pytest.raises(ValueError, match="float16 can't hold"):
        to_stock(tiny_model(**SSD, **LINEAR).to(torch.float16))
    with pytest.raises(ValueError, match="CABVisionMambaForImageClassification"):
        to_stock(tiny_vision_model())


def test_the_default_student_of_a_llama_is_a_granite_hybrid(tmp_path):
    student = student_from_teacher(tiny_teacher(), calibration_inputs={"input_ids": random_ids(2, 9, vocab_size=61)})
    assert (student.config.conv_activation, student.config.use_bias) == (None, True)  # transparent, and still stock
    shake(student)
    student.save_pretrained(tmp_path / "student")
    export_stock(tmp_path / "student", tmp_path / "stock")
    stock, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "stock"), random_ids(2, 13, vocab_size=61)
    assert type(stock) is GraniteMoeHybridForCausalLM
    assert "auto_map" not in json.loads((tmp_path / "stock/config.json").read_text())
    assert stock.config.max_position_embeddings == 131072  # what vLLM takes for the longest context
    assert largest_difference(logits(stock, ids), logits(student, ids)) < 1e-4
    with pytest.raises(FileExistsError, match="holds a model already"):
        export_stock(tmp_path / "student", tmp_path / "stock")


def test_the_served_start_exports_without_wider_states_and_in_half_precision():
    student = shake(student_from_teacher(tiny_teacher(), start="served"))
    half = to_stock(copy.deepcopy(student).half()).state_dict()
    assert all(torch.equal(half[name], weight.half()) for name, weight in to_stock(student).state_dict().items())
    stock, ids = to_stock(student), random_ids(2, 13, vocab_size=61)
    assert stock.config.mamba_d_state == student.config.state_size
    assert (
        largest_difference(logits(stock, ids), logits(student, ids)) < 3e-4
    )  # of 2.5; slow decays with long steps round more


def saved(folder, **settings) -> dict:
    """Saves a tiny student and returns its config's values."""
    tiny_model(**settings).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_folders_that_hold_no_readable_student(tmp_path):
    with pytest.raises(ValueError, match="holds no model: there is no config.json"):
        read_student(tmp_path)
    values = saved(tmp_path / "newer", **SSD)
    (tmp_path / "newer/config.json").write_text(json.dumps({**values, "rotary_states": True}))
    with pytest.raises(ValueError, match="does not know: rotary_states.*newer.*upgrade"):
        read_student(tmp_path / "newer")
    (tmp_path / "newer/config.json").write_text(json.dumps({**values, "mixer_type": "mamba3"}))
    with pytest.raises(ValueError, match="newer can't be loaded: .*mamba3"):
        read_student(tmp_path / "newer")

    saved(tmp_path / "cut", **SSD)
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        read_student(tmp_path / "cut")
    values = saved(tmp_path / "mixed", **SSD)
    (tmp_path / "mixed/config.json").write_text(json.dumps({**values, "intermediate_size": 24}))
    with pytest.raises(ValueError, match="lack 8 tensors, such as backbone.layers.0"):
        read_student(tmp_path / "mixed")

    tiny_model(**SSD).backbone.save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match="holds a CABMambaModel, but a CABMambaForCausalLM is needed"):
        read_student(tmp_path / "backbone")
    tiny_teacher().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="'llama' model and no student"):
        read_student(tmp_path / "llama")


@pytest.mark.parametrize("modality", ["text", "images"])
def test_the_program_of_torch_export_takes_any_batch(modality):
    if modality == "text":
        student, inputs = tiny_model(mixer_type="mamba"), random_ids(5, 19)
    else:
        student, inputs = tiny_vision_model(), random_images(5)
    program = to_program(student, tokens=19)
    with torch.no_grad():
        assert largest_difference(program.module()(inputs), student(inputs).logits) < 1e-5


@pytest.mark.parametrize("modality", ["text, s6", "text, ssd", "images, s6"])
def test_onnx_agrees_for_any_batch(tmp_path, modality):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    if modality.startswith("text"):
        settings = {"mixer_type": "mamba"} if modality.endswith("s6") else {**SSD, **MLP, "num_hidden_layers": 1}
        student, inputs = tiny_model(**settings), random_ids(5, 19)
    else:
        student, inputs = tiny_vision_model(num_hidden_layers=1), random_images(5)
    student.save_pretrained(tmp_path / "student")
    path = export_onnx(tmp_path / "student", tmp_path / "onnx", tokens=19)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(["logits"], {student.main_input_name: inputs.numpy()})
    assert largest_difference(torch.from_numpy(result), logits(student, inputs)) < 1e-4
    with pytest.raises(FileExistsError, match="exists already"):
        export_onnx(tmp_path / "student", tmp_path / "onnx")


def test_what_is_no_student_has_no_program():
    with pytest.raises(ValueError, match="tokens is 0"):
        to_program(tiny_model(), tokens=0)
    with pytest.raises(ValueError, match="LlamaForCausalLM; give a pure student with its head.*--to stock"):
        to_program(tiny_teacher())

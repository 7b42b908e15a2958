"""Windows of attention beside mixers: against the same window cut out of a Transformer by its mask alone."""

import copy

import pytest
import torch
from tiny_models import largest_difference
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from cab_hf import DistillationTrainer, DistillationTrainingArguments, student_from_teacher
from cab_hf.evaluation.controls import with_window, without_mixers
from cab_hf.evaluation.tiny_families import tiny_model, tiny_tokens
from cab_hf.export.onnx import to_program
from cab_hf.export.stock import to_stock
from cab_hf.models.window import WindowCacheLayer
from cab_hf.transfer.hybrid import hybrid_from_teacher


WINDOW, SINKS = 5, 2
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FAMILIES = ["llama", "gpt2", "gpt_neox", "qwen3", "phi3", "opt"]
SLIDING = ["mistral", "gemma2", "cohere2", "gpt_oss"]


def windowed(family="llama", kept=(), speaks=False):
    student = hybrid_from_teacher(
        tiny_model(family), keep_attention=list(kept), attention_window=WINDOW, attention_sinks=SINKS
    )
    if speaks:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for adapter in student.mixers.values():
                weight = adapter.mixer.out_proj.weight
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return student


@pytest.fixture(autouse=True)
def no_gradients(request):
    with torch.set_grad_enabled("train" in request.node.name):
        yield


def long_tokens():
    return tiny_tokens().repeat(1, 3)[:, :29]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_starts_as_its_teacher_with_a_window(family):
    tokens = long_tokens()
    student, limited = windowed(family), with_window(tiny_model(family), WINDOW, SINKS)
    assert largest_difference(student(tokens).logits, limited(tokens).logits) < 1e-5
    assert largest_difference(student(tokens).logits, tiny_model(family)(tokens).logits) > 1e-2
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    got, right = (model(tokens, attention_mask=mask).logits * mask[..., None] for model in (student, limited))
    assert largest_difference(got, right) < 1e-5


@pytest.mark.parametrize("family", [*FAMILIES, *SLIDING])
def test_tokens_from_a_cache_are_those_without_behind_padding_and_in_beams(family):
    student, tokens = windowed(family, kept=(1,), speaks=True), long_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    for options in (GREEDY, GREEDY | {"num_beams": 3}):
        options = options | {"attention_mask": mask}
        assert torch.equal(student.generate(tokens, **options), student.generate(tokens, use_cache=False, **options))


@pytest.mark.parametrize("pieces", [(29,), (3, 26), (1,) * 29, (13, 1, 1, 1, 13), (20, 9)])
def test_pieces_of_any_length_give_what_the_whole_row_does(pieces):
    student, tokens = windowed(speaks=True), long_tokens()
    mask, cache, said = torch.ones_like(tokens), DynamicCache(config=student.config), []
    mask[1, :4] = 0
    whole = student(tokens, attention_mask=mask).logits
    for piece in tokens.split(pieces, dim=1):
        past = sum(one.shape[1] for one in said) + piece.shape[1]
        said.append(student(piece, attention_mask=mask[:, :past], cache=cache).logits)
    assert largest_difference(torch.cat(said, 1) * mask[..., None], whole * mask[..., None]) < 1e-5


def test_packed_documents_have_windows_and_sinks_of_their_own():
    student, tokens = windowed(speaks=True), long_tokens()
    seq_idx = torch.tensor([[0] * 9 + [1] * 12 + [2] * 8]).expand(len(tokens), -1)
    alone = torch.cat([student(one).logits for one in tokens.split((9, 12, 8), dim=1)], 1)
    assert largest_difference(student(tokens, seq_idx=seq_idx).logits, alone) < 1e-5


def test_what_a_cache_holds_does_not_grow():
    student, tokens = windowed(), long_tokens()
    sizes = []
    for length in (1, 12, 29):
        layers = student(tokens[:, :length]).cache.layers
        assert all(type(layer) is WindowCacheLayer for layer in layers)
        sizes.append([tensor.shape for layer in layers for tensor in layer.tensors()])
    assert sizes[0] == sizes[1] == sizes[2]
    assert layers[0].keys.shape[2] == WINDOW + SINKS + 1


def test_a_saved_one_loads_as_it_was(tmp_path):
    student, tokens = windowed(kept=(0,), speaks=True), long_tokens()
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, student(tokens).logits)
    assert again.config.windows == [WINDOW] * 3


def test_zeroed_mixers_leave_the_window():
    student, tokens = windowed(speaks=True), long_tokens()
    right = with_window(tiny_model("llama"), WINDOW, SINKS)(tokens).logits
    assert largest_difference(without_mixers(student)(tokens).logits, right) < 1e-5


def test_mixers_are_fitted_to_what_the_window_lacks():
    teacher = tiny_model("llama")
    rows = torch.randint(1, 90, (32, 40), generator=torch.Generator().manual_seed(0))
    options = {"attention_window": WINDOW, "attention_sinks": 0}
    fitted, silent = (student_from_teacher(teacher, data=data, **options) for data in ([{"input_ids": rows}], ()))
    with torch.no_grad():
        errors = [(student(rows).logits - teacher(rows).logits).square().mean() for student in (fitted, silent)]
    assert errors[0] < errors[1], errors  # of random attention little can be foretold
    assert all(one.mixer.out_proj.weight.abs().max() > 0 for one in fitted.mixers.values())


def test_training_reaches_windows_and_mixers(tmp_path):
    teacher = tiny_model("llama")
    student = windowed(kept=(1,))
    before = copy.deepcopy(student.state_dict())
    rows = [{"input_ids": row, "labels": row} for row in long_tokens().repeat(4, 1)]
    options = {"max_steps": 3, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    args = DistillationTrainingArguments(str(tmp_path), learning_rate=1e-3, bridge_weight=0.5, **options)
    DistillationTrainer(student, teacher, args, train_dataset=rows).train()
    changed = [name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])]
    for part in (".window.attention.q_proj.", ".mixer.in_proj.", ".mixer.out_proj."):
        assert any(part in name for name in changed), part


@pytest.mark.parametrize("loss", ["output_weight", "attention_weight"])
def test_training_on_what_a_mixer_beside_a_window_lacks_is_refused(loss, tmp_path):
    args = DistillationTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **{loss: 1.0})
    rows = [{"input_ids": row} for row in long_tokens()]
    with pytest.raises(ValueError, match=rf"`{loss}` is 1.0, but the student's mixers stand beside windows"):
        DistillationTrainer(windowed(), tiny_model("llama"), args, train_dataset=rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_window": -1}, "`attention_window` is -1"),
        ({"attention_window": 8, "attention_sinks": -2}, "`attention_sinks` is -2"),
        ({"attention_window": "8"}, "`attention_window` is '8'"),
    ],
)
def test_a_window_that_is_none_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        hybrid_from_teacher(tiny_model("llama"), **given)


def test_attention_that_has_no_window_is_refused():
    with pytest.raises(ValueError, match="`attention_window` is 8, but a XGLMAttention does not attend through"):
        hybrid_from_teacher(tiny_model("xglm"), attention_window=8, accept_inexact=1.0)


def test_a_cache_is_repeated_and_picked_from_row_by_row():
    student, tokens = windowed(speaks=True), long_tokens()
    whole, cache = student(tokens).logits[:, 20:], DynamicCache()
    student(tokens[:, :20], cache=cache, use_cache=True)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 3]))
    assert largest_difference(student(tokens[:, 20:], cache=cache, use_cache=True).logits, whole) < 1e-5


def test_a_cache_that_another_model_filled_is_refused():
    models = [tiny_model("llama"), hybrid_from_teacher(tiny_model("llama")), windowed()]
    for reader in models[1:]:
        for other in models:
            cache = DynamicCache()
            other(long_tokens(), cache=cache, use_cache=True)
            if other is reader:
                assert reader(long_tokens()[:, :2], cache=cache, use_cache=True).logits.shape[1] == 2
                continue
            with pytest.raises(ValueError, match="of 29 tokens for layers.0.self_attn, which another model filled"):
                reader(long_tokens()[:, :2], cache=cache, use_cache=True)


def test_a_mask_of_ones_costs_what_none_does_and_nothing_stays():
    student, tokens = windowed(speaks=True), long_tokens()
    output = student(tokens, attention_mask=torch.ones_like(tokens), use_cache=True)
    assert torch.equal(output.logits, student(tokens).logits)
    assert all(layer.sight is None for layer in output.cache.layers)


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")
@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_terms_of_attention_that_one_kernel_lacks_are_kept(family, tmp_path):
    student, tokens = windowed(family), long_tokens()
    student.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flex_attention")
    assert largest_difference(other(tokens).logits, student(tokens).logits) < 1e-4


def test_layers_that_slide_do_not_say_how_wide_others_are():
    windows = hybrid_from_teacher(tiny_model("exaone4"), attention_window=12, attention_sinks=SINKS).mixers.values()
    assert [(one.window.window, one.window.sinks) for one in windows] == [(8, 0)] * 3 + [(12, SINKS)]


@pytest.mark.parametrize("family", ["doge", "bert"])
def test_attention_that_works_in_no_window_is_refused_in_one_line(family):
    with pytest.raises(ValueError, match="`attention_window` is .*does not work within one|.* attends both ways"):
        hybrid_from_teacher(tiny_model(family), attention_window=WINDOW)


def test_exports_name_the_window():
    for export in (to_stock, to_program):
        with pytest.raises(ValueError, match=f"`attention_window`.* is {WINDOW}"):
            export(windowed())

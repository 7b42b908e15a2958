"""A student without extras is transformers' Mamba or Mamba-2: same names, logits, gradients and texts."""

import pytest
import torch
from tiny_models import MIXER_TYPES, largest_difference, random_ids, shake, tiny_model
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from cab_hf.models import CABMambaForCausalLM


CASES = {
    "default": {},
    "biases": {"use_bias": True, "use_conv_bias": False},
    "narrow conv, untied": {"conv_kernel": 2, "tie_word_embeddings": False},
}
GROUPS = [("mamba", {}), ("mamba2", {"n_groups": 1}), ("mamba2", {"n_groups": 2}), ("mamba2", {"n_groups": 4})]
SHARED = (
    "vocab_size hidden_size num_hidden_layers state_size expand conv_kernel use_bias use_conv_bias "
    "layer_norm_epsilon residual_in_fp32 tie_word_embeddings"
).split()


def pair(mixer_type: str, **overrides) -> tuple[CABMambaForCausalLM, PreTrainedModel]:
    """A student and the stock model with the student's weights."""
    student = tiny_model(mixer_type=mixer_type, **overrides)
    config, names = student.config, list(SHARED)
    config_class, model_class = MambaConfig, MambaForCausalLM
    if mixer_type == "mamba2":
        config_class, model_class = Mamba2Config, Mamba2ForCausalLM
        names += ["num_heads", "head_dim", "n_groups", "chunk_size", "time_step_limit"]
    settings = {name: getattr(config, name) for name in names}
    stock = model_class(config_class(**settings, pad_token_id=0, bos_token_id=None, eos_token_id=None)).eval()
    stock.load_state_dict(student.state_dict(), strict=True)
    return student, stock


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mixer_type, groups", GROUPS)
def test_logits_and_gradients(mixer_type, groups, case):
    student, stock = pair(mixer_type, **groups, **CASES[case])
    ids = random_ids(2, 11)
    results = [model(ids, labels=ids, output_hidden_states=True) for model in (student, stock)]
    assert largest_difference(*(result.logits for result in results)) < 1e-4
    assert largest_difference(*(result.loss for result in results)) < 1e-5
    ours, theirs = (result.hidden_states for result in results)  # stock leaves out the embeddings
    assert largest_difference(ours[1], theirs[0]) < 1e-4 and largest_difference(ours[-1], theirs[-1]) < 1e-4
    for result in results:
        (100 * result.loss).backward()
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    assert gradients.keys() == {name for name, _ in student.named_parameters()}
    for name, parameter in student.named_parameters():
        scale = max(1.0, float(gradients[name].abs().max()))
        assert float(gradients[name].abs().max()) > 0, name
        assert largest_difference(parameter.grad, gradients[name]) < 1e-4 * scale, name


@pytest.mark.parametrize("mixer_type, groups", GROUPS)
def test_left_padding_and_greedy_generation(mixer_type, groups):
    student, stock = pair(mixer_type, **groups)
    ids = random_ids(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, :7] = 0, 0
    with torch.no_grad():
        ours, theirs = (model(ids, attention_mask=mask).logits for model in (student, stock))
    assert largest_difference(ours[mask.bool()], theirs[mask.bool()]) < 1e-4
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(student.generate(ids, **settings), stock.generate(ids, **settings))
    settings["num_beams"] = 3
    assert torch.equal(student.generate(ids, **settings), stock.generate(ids, **settings))


def test_the_limit_of_time_steps_binds_as_in_stock():
    student, stock = pair("mamba2", n_groups=2, time_step_limit=(0.5, 0.8))
    free, _ = pair("mamba2", n_groups=2)
    ids = random_ids(2, 11)
    with torch.no_grad():
        assert largest_difference(student(ids).logits, stock(ids).logits) < 1e-4
        assert largest_difference(student(ids).logits, free(ids).logits) > 1e-2
        steps = student(ids, output_projections=True).projections[0].time_step
    assert float(steps.min()) == 0.5 and float(steps.max()) == pytest.approx(0.8)


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_stock_weights_load_into_a_student(mixer_type):
    student, stock = pair(mixer_type)
    shake(stock, seed=7)
    with torch.no_grad():
        assert largest_difference(student(random_ids(2, 9)).logits, stock(random_ids(2, 9)).logits) > 1e-2
        student.load_state_dict(stock.state_dict(), strict=True)
        assert largest_difference(student(random_ids(2, 9)).logits, stock(random_ids(2, 9)).logits) < 1e-4


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_half_precision_agrees_with_stock(mixer_type):
    student, stock = pair(mixer_type)
    ids = random_ids(2, 11)
    with torch.no_grad():
        expected = stock(ids).logits
        student, stock = student.to(torch.bfloat16), stock.to(torch.bfloat16)
        ours, theirs = student(ids).logits.float(), stock(ids).logits.float()
    error = [float((logits - expected).std() / expected.std()) for logits in (ours, theirs)]
    assert error[0] < max(1.2 * error[1], 0.02)

"""States that turn: cached tokens, pieces, padding and packed rows give what whole rows give, and attention does."""

import pytest
import torch

from cab_hf import CABMambaConfig, CABMambaForCausalLM
from cab_hf.models.mixers import SSDMixer
from cab_hf.models.state_rotation import rotate


FREQUENCIES = [0.9, 0.2, 0.03]


def make_model(**fields) -> CABMambaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "n_groups": 4, "expand": 1}
    sizes |= {"mixer_type": "mamba2", "state_size": 8, "transition_init": "moving_average"}
    model = CABMambaForCausalLM(CABMambaConfig(**sizes | {"rotary_frequencies": FREQUENCIES} | fields))
    for layer in model.backbone.layers:
        layer.mixer.in_proj.weight.data.mul_(20)
    return model.eval()


TOKENS = torch.arange(2 * 12).view(2, 12) * 7 % 50


@pytest.mark.parametrize("fields", [{}, {"rotary_interleaved": True}, {"n_groups": 2}, {"state_size": 6}])
@torch.no_grad()
def test_tokens_behind_a_cache_give_what_the_whole_row_gives(fields):
    model = make_model(**fields)
    whole = model(TOKENS).logits
    cache, said = None, []
    for piece in TOKENS.split((3, 1, 4, 1, 1, 2), dim=1):
        output = model(piece, cache=cache, use_cache=True)
        cache = output.cache
        said.append(output.logits)
    torch.testing.assert_close(torch.cat(said, dim=1), whole, atol=1e-5, rtol=1e-4)
    still = make_model(**fields | {"rotary_frequencies": None})
    assert (still(TOKENS).logits - whole).abs().max() > 0.01


@torch.no_grad()
def test_padding_takes_no_place():
    model = make_model(conv_init="transparent")  # a convolution reads the padding between real tokens
    pad = torch.zeros(2, 2, dtype=torch.long)
    whole = model(TOKENS).logits
    tokens = torch.cat((pad, TOKENS[:, :5], pad, TOKENS[:, 5:], pad), dim=1)
    mask = torch.ones_like(tokens)
    mask[:, :2] = mask[:, 7:9] = mask[:, -2:] = 0
    real = mask[0].bool()
    torch.testing.assert_close(model(tokens, attention_mask=mask).logits[:, real], whole, atol=1e-5, rtol=1e-4)
    cache, said = None, []
    for end in range(1, tokens.shape[1] + 1):
        output = model(tokens[:, end - 1 : end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
        cache = output.cache
        said.append(output.logits)
    torch.testing.assert_close(torch.cat(said, dim=1)[:, real], whole, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_packed_documents_stay_apart():
    model = make_model()
    packed = model(TOKENS.view(1, -1), seq_idx=torch.arange(2).repeat_interleave(12)[None].int()).logits
    torch.testing.assert_close(packed.view(2, 12, -1), model(TOKENS).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_attention_map_is_what_the_scan_applies():
    mixer = make_model().backbone.layers[0].mixer
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    stream, _ = mixer.stream_and_gate(hidden)
    y, B, C, dt = mixer.scan(stream)
    x = mixer.convolve(stream[..., :-4], None, None, None)[..., :32].unflatten(-1, (4, 8))
    made = torch.einsum("bhij,bjhp->bihp", mixer.attention_map(B, C, dt), x).flatten(-2)
    torch.testing.assert_close(made, y, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_with_decays_of_one_it_is_linear_attention_with_rotary_positions():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    mixer: SSDMixer = make_model(transition_init="identity", state_size=6).backbone.layers[0].mixer
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    stream, _ = mixer.stream_and_gate(hidden)
    y, B, C, dt = mixer.scan(stream)
    x = mixer.convolve(stream[..., :-4], None, None, None)[..., :32].unflatten(-1, (4, 8))
    angles = (torch.arange(9)[:, None] * torch.tensor(FREQUENCIES)).repeat(1, 2)[None]
    query, key = apply_rotary_pos_emb(C.transpose(1, 2), B.transpose(1, 2), angles.cos(), angles.sin())
    scores = (query @ key.transpose(-1, -2)).tril()  # (b, h, t, t)
    made = torch.einsum("bhij,bjh,bjhp->bihp", scores, dt, x) + mixer.D[:, None] * x
    torch.testing.assert_close(y, made.flatten(-2), atol=1e-4, rtol=1e-4)


def test_half_precision_keeps_frequencies(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = CABMambaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    frequencies = loaded.backbone.layers[1].mixer.rotary_frequencies
    assert loaded.dtype == torch.bfloat16 and frequencies.tolist() == torch.tensor(FREQUENCIES).tolist()


def test_a_student_whose_states_stood_still_may_begin_to_turn(tmp_path):
    make_model(rotary_frequencies=None).save_pretrained(tmp_path)
    loaded = CABMambaForCausalLM.from_pretrained(tmp_path, rotary_frequencies=FREQUENCIES)
    for mixer in loaded.mixer_list:
        assert torch.equal(mixer.rotary_frequencies, torch.tensor(FREQUENCIES))


def test_each_layer_may_turn_at_its_own_pace():
    model = make_model(rotary_frequencies=[[0.5], []])
    mixers = [layer.mixer for layer in model.backbone.layers]
    assert [mixer.pairs for mixer in mixers] == [1, 0]


def test_gradients_go_through_the_rotation():
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles), (x,))
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles, True), (x,))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mixer_type": "mamba"}, "S6's states do not turn"),
        ({"rotary_frequencies": [1.0] * 5}, "`state_size` is 8"),
        ({"rotary_frequencies": [[1.0]] * 3}, "lists for 3 layers"),
    ],
)
def test_what_does_not_fit_is_refused(fields, said):
    with pytest.raises(Exception, match=said):
        make_model(**fields)

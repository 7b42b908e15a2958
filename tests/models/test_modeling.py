"""Padding, cache, generation and learned positions: a sequence's logits do not depend on how it was fed."""

import pytest
import torch
from tiny_models import MIXER_TYPES, VARIANTS, largest_difference, random_ids, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StaticCache,
    pipeline,
)

from cab_hf.models import CABMambaForCausalLM, CABMambaForSequenceClassification, CABMambaModel, mixers


SPLITS = ([8, 5], [1, 12], [12, 1], [4, 1, 1, 7])
GENERATING = ["s6", "s6 positions, plain mlp", "ssd 2 groups, gated mlp", "mixed"]


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny_model(**VARIANTS[request.param])


def padded(ids: torch.Tensor, left: int, right: int, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """`ids` (1, t) between random pad ids: the row, its mask, and where the real tokens are."""
    pads = random_ids(1, left + right, seed=seed)
    row = torch.cat([pads[:, :left], ids, pads[:, left:]], dim=1)
    real = slice(left, left + ids.shape[1])
    mask = torch.zeros_like(row)
    mask[:, real] = 1
    return row, mask, real


@torch.no_grad()
def fed(model, ids: torch.Tensor, mask: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """Logits of a row fed chunk by chunk through one cache."""
    cache, logits, start = None, [], 0
    for chunk in chunks:
        end = start + chunk
        output = model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
        cache, start = output.cache, end
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def naive_norm(module, x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "layer_norm":
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * module.weight + module.bias
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * module.weight


def naive_mlp(mlp, x: torch.Tensor, gated: bool) -> torch.Tensor:
    up = x @ mlp.up_proj.weight.T + (0 if mlp.up_proj.bias is None else mlp.up_proj.bias)
    if gated:
        gate = x @ mlp.gate_proj.weight.T + (0 if mlp.gate_proj.bias is None else mlp.gate_proj.bias)
        up = torch.nn.functional.gelu(gate) * up
    else:
        up = torch.nn.functional.gelu(up)
    return up @ mlp.down_proj.weight.T + (0 if mlp.down_proj.bias is None else mlp.down_proj.bias)


@torch.no_grad()
def test_a_block_adds_up(model):
    """Sequential: `h = x + mixer(norm(x)); h + mlp(norm(h))`. Parallel: `x + mixer(norm(x)) + mlp(norm(x))`.

    With `post_norms` mixer and MLP are normed before they are added.
    """
    block, config = model.backbone.layers[0], model.config

    def added(norm, x: torch.Tensor) -> torch.Tensor:
        assert (norm is not None) == config.post_norms
        return x if norm is None else naive_norm(norm, x, config.norm_type)

    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    normed = naive_norm(block.norm, x, config.norm_type)
    expected = x + added(block.post_norm, block.mixer(normed)[0])
    if config.intermediate_size:
        if config.shared_norm:
            assert block.mlp_norm is None
        else:
            normed = naive_norm(block.mlp_norm, x if config.parallel_residual else expected, config.norm_type)
        expected = expected + added(block.post_mlp_norm, naive_mlp(block.mlp, normed, config.gated_mlp))
    assert largest_difference(block(x)[0], expected) < 1e-4
    final = naive_norm(model.backbone.norm_f, expected, config.norm_type)
    logits = final @ model.lm_head.weight.T + (0 if model.lm_head.bias is None else model.lm_head.bias)
    model.backbone.layers = model.backbone.layers[:1]
    model.backbone.position_embeddings = None
    assert largest_difference(model(inputs_embeds=x, use_cache=False).logits, logits) < 1e-4


@torch.no_grad()
def test_embeddings_are_multiplied_where_they_are_looked_up(tmp_path):
    sizes, ids = VARIANTS["ssd post norms, scaled embeddings"], random_ids(2, 5)
    model, plain = tiny_model(**sizes), tiny_model(**sizes | {"embedding_multiplier": 1})
    plain.load_state_dict(model.state_dict())
    expected = plain(inputs_embeds=5.7 * plain.get_input_embeddings()(ids)).logits
    assert largest_difference(expected, plain(ids).logits) > 0.1
    model.save_pretrained(tmp_path)
    for one in (model, CABMambaForCausalLM.from_pretrained(tmp_path)):
        assert largest_difference(one(ids).logits, expected) < 1e-4
        embedded = one.get_input_embeddings()(ids)
        assert torch.equal(one(inputs_embeds=embedded).logits, one(ids).logits)


@torch.no_grad()
def test_the_residual_stream_is_float32_if_asked_for():
    for residual_in_fp32 in (True, False):
        model = tiny_model(mixer_type="mamba2", residual_in_fp32=residual_in_fp32).to(torch.bfloat16)
        hidden_states = model(random_ids(1, 5), output_hidden_states=True).hidden_states
        assert hidden_states[1].dtype == (torch.float32 if residual_in_fp32 else torch.bfloat16)
        assert hidden_states[-1].dtype == torch.bfloat16


@torch.no_grad()
def test_padding_never_reaches_a_real_token(model):
    ids = random_ids(1, 7)
    alone = model(ids).logits
    rows = [padded(ids, left, 4 - left, seed=left) for left in (0, 2, 4)]
    for row, mask, real in rows:
        assert largest_difference(model(row, attention_mask=mask).logits[:, real], alone) < 1e-4
        assert largest_difference(model(row, attention_mask=mask.bool()).logits[:, real], alone) < 1e-4
    together = model(torch.cat([row for row, _, _ in rows]), attention_mask=torch.cat([mask for _, mask, _ in rows]))
    for index, (_, _, real) in enumerate(rows):
        assert largest_difference(together.logits[index : index + 1, real], alone) < 1e-4


@torch.no_grad()
def test_padding_matters_when_nobody_says_so(model):
    """The comparison above can fail: without a mask the pad tokens do reach the real ones."""
    ids = random_ids(1, 7)
    row, _, real = padded(ids, 4, 0)
    assert largest_difference(model(row).logits[:, real], model(ids).logits) > 1e-2


@pytest.mark.parametrize("left, right", [(0, 0), (3, 0), (0, 3), (2, 1)])
def test_prefill_and_steps_equal_one_forward(model, left, right):
    ids = random_ids(1, 11)
    with torch.no_grad():
        whole = model(ids).logits
    row, mask, real = padded(ids[:, :7], left, right)
    row, mask = torch.cat([row, ids[:, 7:]], dim=1), torch.cat([mask, mask.new_ones(1, 4)], dim=1)
    logits = fed(model, row, mask, [7 + left + right, 1, 1, 1, 1])
    assert largest_difference(logits[:, real], whole[:, :7]) < 1e-4
    assert largest_difference(logits[:, -4:], whole[:, 7:]) < 1e-4


def test_steps_in_parts_equal_one_forward(model, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(mixers, "SMALLEST_IN_PARTS", 1)
    ids = random_ids(1, 11)
    with torch.no_grad():
        logits = fed(model, ids, torch.ones_like(ids), [7, 1, 1, 1, 1])
        assert largest_difference(logits, model(ids).logits) < 1e-4


@pytest.mark.parametrize("chunks", SPLITS, ids=str)
def test_prefill_in_chunks_equals_one_forward(model, chunks):
    """Chunks may hold only padding, or begin or end in it; what counts is the state that the last one leaves."""
    ids, extra = random_ids(1, 13), random_ids(1, 2, seed=9)
    with torch.no_grad():
        whole = model(torch.cat([ids, extra], dim=1)).logits
    logits = fed(model, torch.cat([ids, extra], dim=1), ids.new_ones(1, 15), [*chunks, 1, 1])
    assert largest_difference(logits, whole) < 1e-4
    for left, right in ((5, 0), (9, 0), (0, 1), (0, 5), (0, 9), (4, 4)):
        short = ids[:, : 13 - left - right]
        with torch.no_grad():
            alone = model(torch.cat([short, extra], dim=1)).logits
        row, mask, real = padded(short, left, right)
        row, mask = torch.cat([row, extra], dim=1), torch.cat([mask, mask.new_ones(1, 2)], dim=1)
        logits = fed(model, row, mask, [*chunks, 1, 1])
        assert largest_difference(logits[:, real], alone[:, :-2]) < 1e-4, (left, right)
        assert largest_difference(logits[:, -2:], alone[:, -2:]) < 1e-4, (left, right)


@torch.no_grad()
def test_a_row_of_padding_alone_is_harmless(model):
    ids = random_ids(2, 6)
    mask = torch.tensor([[0] * 6, [1] * 6])
    logits = model(ids, attention_mask=mask).logits
    assert bool(logits.isfinite().all())
    assert largest_difference(logits[1:], model(ids[1:]).logits) < 1e-4


@torch.no_grad()
def test_rows_of_one_batch_keep_their_own_states(model):
    """One row right-padded, one left-padded, one full: the last chunk is a single token, padding in the first row."""
    ids = random_ids(1, 12)
    rows = [padded(ids[:, :10], 0, 2), padded(ids[:, :9], 3, 0), (ids, torch.ones_like(ids), None)]
    row, mask = torch.cat([r for r, _, _ in rows]), torch.cat([m for _, m, _ in rows])
    extra = random_ids(1, 2, seed=9)
    row, mask = torch.cat([row, extra.expand(3, -1)], dim=1), torch.cat([mask, mask.new_ones(3, 2)], dim=1)
    logits = fed(model, row, mask, [11, 1, 1, 1])
    for index, length in enumerate((10, 9, 12)):
        alone = model(torch.cat([ids[:, :length], extra], dim=1)).logits
        assert largest_difference(logits[index : index + 1, -2:], alone[:, -2:]) < 1e-4


@torch.no_grad()
def test_gradients_of_padding_are_zero_and_of_real_tokens_those_of_the_row_alone():
    for name in ("s6", "ssd 2 groups, gated mlp"):
        model, ids = tiny_model(**VARIANTS[name]), random_ids(1, 7)
        row, mask, real = padded(ids, 2, 3)
        with torch.enable_grad():
            embedded = model.get_input_embeddings()(row).detach().requires_grad_()
            model(inputs_embeds=embedded, attention_mask=mask).logits[:, real].square().sum().backward()
            alone = model.get_input_embeddings()(ids).detach().requires_grad_()
            model(inputs_embeds=alone).logits.square().sum().backward()
        scale = float(alone.grad.abs().max())
        assert largest_difference(embedded.grad[:, real], alone.grad) < 1e-4 * scale
        assert float((embedded.grad * (mask == 0)[..., None]).abs().max()) == 0.0


@pytest.mark.parametrize("kernel", [1, 2, 4, 6])
@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_any_number_of_taps(mixer_type, kernel):
    model, ids = tiny_model(mixer_type=mixer_type, conv_kernel=kernel), random_ids(1, 9)
    with torch.no_grad():
        whole = model(ids).logits
    assert largest_difference(fed(model, ids, torch.ones_like(ids), [3, 1, 4, 1]), whole) < 1e-4


@torch.no_grad()
def test_chunk_size_does_not_matter():
    model, ids = tiny_model(mixer_type="mamba2", n_groups=2), random_ids(2, 37)
    outputs = []
    for chunk_size in (1, 3, 16, 256):
        model.config.chunk_size = chunk_size
        outputs.append(model(ids).logits)
    assert max(largest_difference(outputs[0], output) for output in outputs[1:]) < 1e-4


@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_cache_equals_without(name):
    model, ids = tiny_model(**VARIANTS[name]), random_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    for strategy in ({"num_beams": 1}, {"num_beams": 3}, {"do_sample": True}, {"num_beams": 3, "do_sample": True}):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            settings = {"do_sample": False, "max_new_tokens": 5, "use_cache": use_cache, "pad_token_id": 0, **strategy}
            lengths = []
            with model.backbone.norm_f.register_forward_hook(lambda _, args, out, n=lengths: n.append(out.shape[1])):
                results.append(model.generate(ids, attention_mask=mask, **settings))
            assert lengths == ([6, 1, 1, 1, 1] if use_cache else [6, 7, 8, 9, 10])
        assert results[0].shape == (2, 11)
        assert torch.equal(*results), strategy


@pytest.mark.parametrize("name", GENERATING)
def test_generation_from_a_left_padded_batch_equals_each_row_alone(name):
    model, ids = tiny_model(**VARIANTS[name]), random_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    batch = model.generate(ids, attention_mask=mask, **settings)[:, 6:]
    assert torch.equal(batch[:1], model.generate(ids[:1, 3:], **settings)[:, 3:])
    assert torch.equal(batch[1:], model.generate(ids[1:], **settings)[:, 6:])
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(batch, model.generate(inputs_embeds=embedded, attention_mask=mask, **settings))


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_a_static_cache_and_a_continued_cache_work(mixer_type):
    model, ids = tiny_model(mixer_type=mixer_type), random_ids(2, 6)
    settings = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0, "return_dict_in_generate": True}
    first = model.generate(ids, **settings)
    assert torch.equal(first.sequences, model.generate(ids, cache_implementation="static", **settings).sequences)
    # the next turn gives the tokens that the cache has not seen: the last one generated and the new ones
    question = random_ids(2, 3, seed=4)
    unseen = torch.cat([first.sequences[:, -1:], question], dim=1)
    second = model.generate(unseen, cache=first.cache, **settings).sequences[:, 4:]
    again = model.generate(torch.cat([first.sequences, question], dim=1), **settings).sequences[:, 13:]
    assert torch.equal(second, again)


@torch.no_grad()
def test_the_cache_holds_fixed_size_states():
    model = tiny_model(**VARIANTS["mixed"])
    cache = DynamicCache(config=model.config)
    shapes = []
    for length in (1, 5, 1):
        returned = model(random_ids(2, length), cache=cache, use_cache=True).cache
        assert returned is cache
        shapes.append([tuple(f(i).shape) for i in range(2) for f in (cache.get_conv_state, cache.get_recurrent_state)])
    # SSD: 64 channels and B, C of 6; 8 heads of 8. S6: 64 channels.
    assert shapes[0] == [(2, 76, 4), (2, 8, 8, 6), (2, 64, 4), (2, 64, 6)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert cache.get_recurrent_state(0).dtype == torch.float32
    static = StaticCache(config=model.config, max_cache_len=8)
    logits = model(random_ids(2, 5), cache=static, use_cache=True).logits
    assert largest_difference(logits, model(random_ids(2, 5)).logits) < 1e-4


@torch.no_grad()
def test_a_cache_that_would_be_cropped_is_refused():
    """Convolution states could be kept to be rolled back, recurrent ones can't."""
    model, ids = tiny_model(**VARIANTS["mixed"]), random_ids(1, 5)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=8)):
        model(ids, cache=cache, use_cache=True)
        assert not cache.is_croppable
        cache.activate_past_recording()
        for length in (1, 5):
            with pytest.raises(ValueError, match="`activate_past_recording`.*can't be rolled back"):
                model(ids[:, :length], cache=cache, use_cache=True)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    writer = LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes))
    with pytest.raises(ValueError, match="student can't draft"):
        writer.generate(ids, assistant_model=model, max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(ids, assistant_model=model, max_new_tokens=4, do_sample=False)


@torch.no_grad()
@pytest.mark.parametrize("part", ["whole", "backbone"])
def test_the_old_name_of_the_cache_is_deprecated_not_ignored(part):
    model, ids = tiny_model(**VARIANTS["mixed"]), random_ids(1, 6)
    model = model if part == "whole" else model.backbone
    cache = model(ids[:, :4], use_cache=True).cache
    with pytest.warns(FutureWarning, match="`cache_params` is deprecated.*Use `cache`"):
        ended = model(ids[:, 4:], cache_params=cache, use_cache=True)
    assert ended.cache is cache
    assert largest_difference(ended[0], model(ids)[0][:, 4:]) < 1e-4


@torch.no_grad()
def test_a_transformers_cache_is_refused_not_ignored():
    ids = random_ids(1, 6)
    causal, classifier = tiny_model(), CABMambaForSequenceClassification(tiny_model().config).eval()
    cache = causal(ids[:, :4], use_cache=True).cache
    for model in (causal, causal.backbone, classifier):
        with pytest.raises(ValueError, match="`past_key_values` is a DynamicCache.*Pass as `cache`"):
            model(ids[:, 4:], past_key_values=cache)
        assert torch.equal(model(ids, past_key_values=None)[0], model(ids)[0])
    # `generate` itself knows that name as an older one of `cache`.
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated.*Use `cache`"):
        ended = causal.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert torch.equal(ended, causal.generate(ids, max_new_tokens=3, do_sample=False))


@torch.no_grad()
def test_outputs_hold_what_was_asked_for():
    model, ids = tiny_model(**VARIANTS["mixed"]), random_ids(2, 5)
    plain = model(ids, use_cache=False)
    assert list(plain.keys()) == ["logits"]
    output = model(ids, output_hidden_states=True, output_projections=True, output_attentions=True, labels=ids)
    assert len(output.hidden_states) == 3 and len(output.projections) == len(output.attentions) == 2
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(ids))
    backbone = model.backbone(ids)
    assert torch.equal(output.hidden_states[-1], backbone.last_hidden_state)
    assert torch.equal(model.lm_head(backbone.last_hidden_state), output.logits)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    # Fewer rows make another matrix product, which may round differently.
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, output.logits[:, -2:], rtol=1e-5, atol=1e-6)
    some = model(ids, logits_to_keep=torch.tensor([1, 3])).logits
    torch.testing.assert_close(some, output.logits[:, [1, 3]], rtol=1e-5, atol=1e-6)
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], output.logits)
    assert torch.equal(model(ids, return_dict=True).logits, output.logits)
    assert torch.equal(model.backbone(ids)[0], backbone.last_hidden_state)
    with pytest.raises(ValueError, match="input_ids.*inputs_embeds"):
        model(ids, inputs_embeds=output.hidden_states[0])
    with pytest.raises(ValueError, match="input_ids.*inputs_embeds"):
        model()


@torch.no_grad()
def test_learned_positions_follow_the_real_tokens():
    model, ids = tiny_model(**VARIANTS["s6 positions, plain mlp"]), random_ids(1, 6)
    table = model.backbone.position_embeddings.weight
    embedded = model.get_input_embeddings()(ids)
    # the truth: positions added by hand to a model without them
    bare = CABMambaModel(model.config)
    bare.load_state_dict(model.backbone.state_dict())
    bare.position_embeddings = None
    expected = bare.eval()(inputs_embeds=embedded + table[:6]).last_hidden_state
    assert largest_difference(model.backbone(ids).last_hidden_state, expected) < 1e-6
    shifted = bare(inputs_embeds=embedded + table[3:9]).last_hidden_state
    given = model.backbone(ids, position_ids=torch.arange(3, 9)[None]).last_hidden_state
    assert largest_difference(given, shifted) < 1e-6
    assert largest_difference(given, expected) > 1e-2


@torch.no_grad()
def test_learned_positions_that_do_not_exist_or_are_not_known_are_refused():
    model = tiny_model(**{**VARIANTS["s6 positions, plain mlp"], "max_position_embeddings": 6})
    with pytest.raises(ValueError, match="7 tokens.*`max_position_embeddings` is 6"):
        model(random_ids(1, 7))
    with pytest.raises(ValueError, match="7 tokens.*`max_position_embeddings` is 6"):
        fed(model, random_ids(1, 7), torch.ones(1, 7), [6, 1])
    # eight tokens, six of them real
    ids = random_ids(1, 6)
    row, mask, real = padded(ids, 2, 0)
    assert largest_difference(model(row, attention_mask=mask).logits[:, real], model(ids).logits) < 1e-4
    cache = model(ids[:, :3], use_cache=True).cache
    with pytest.raises(ValueError, match="`position_ids`.*`attention_mask`"):
        model(ids[:, 3:4], cache=cache, use_cache=True)
    step = model(ids[:, 3:4], cache=cache, use_cache=True, position_ids=torch.tensor([[3]])).logits
    assert largest_difference(step, model(ids[:, :4]).logits[:, -1:]) < 1e-4


@pytest.fixture
def tokenizer():
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", *(f"w{i}" for i in range(97))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", padding_side="left")


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_text_generation_pipeline(mixer_type, tokenizer, tmp_path):
    model = tiny_model(mixer_type=mixer_type)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    prompts = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9"]
    settings = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    apart = [generator(prompt, **settings)[0]["generated_text"] for prompt in prompts]
    batched = [result[0]["generated_text"] for result in generator(prompts, batch_size=2, **settings)]
    assert apart == batched
    ids = tokenizer(prompts[0], return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 3:]
    assert apart[0].split() == tokenizer.convert_ids_to_tokens(expected)

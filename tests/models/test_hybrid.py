"""Hybrids: the teacher's own class with mixers in it, one cache for both, a padding mask that belongs to a call."""

import copy
import json
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, StaticCache
from transformers.cache_utils import DynamicCache

from cab_hf.evaluation.tiny_families import tiny_model, tiny_tokens
from cab_hf.models import (
    CABHybridConfig,
    CABHybridForCausalLM,
    CABHybridForSequenceClassification,
    CABHybridModel,
)
from cab_hf.models.mixer_adapter import MixerAdapter
from cab_hf.transfer.hybrid import hybrid_from_teacher


GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FAMILIES = ["llama", "gemma2", "gpt_oss", "gpt_neo", "mixtral", "cohere2"]


def hybrid(family="llama", kept=(1, 3), **fields):
    return hybrid_from_teacher(tiny_model(family, **fields), keep_attention=list(kept), accept_inexact=1.0)


def padded(tokens, side="left"):
    padding = torch.zeros(len(tokens), 3, dtype=torch.long)
    real = torch.ones_like(tokens)
    parts = ((padding, tokens), (padding, real)) if side == "left" else ((tokens, padding), (real, padding))
    return {"input_ids": torch.cat(parts[0], 1), "attention_mask": torch.cat(parts[1], 1)}


@pytest.mark.parametrize("kept", [(), (1, 3), (0,)])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_same_with_a_cache_without_and_behind_padding(family, kept):
    student, tokens = hybrid(family, kept), tiny_tokens()
    with_cache = student.generate(tokens, **GREEDY)
    assert len(set(with_cache[:, 12:].flatten().tolist())) > 2
    assert torch.equal(with_cache, student.generate(tokens, use_cache=False, **GREEDY))
    assert torch.equal(student.generate(**padded(tokens), **GREEDY)[:, 3:], with_cache)
    beams = [student.generate(tokens, use_cache=use, num_beams=3, **GREEDY) for use in (True, False)]
    assert torch.equal(*beams)


def test_a_mask_that_mixers_can_not_read_is_refused():
    student, tokens = hybrid(), tiny_tokens()
    with pytest.raises(ValueError, match=r"`attention_mask` has the shape \(2, 1, 12, 12\), but mixers read rows"):
        student(tokens, attention_mask=torch.ones(2, 1, 12, 12).tril())


@torch.no_grad()
def test_prefill_in_pieces_and_positions_of_kept_attention():
    student, tokens = hybrid(kept=(3,)), tiny_tokens()
    whole = student(tokens).logits
    cache = DynamicCache(config=student.config)
    parts = [student(piece, past_key_values=cache).logits for piece in tokens.split([5, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 12 and type(cache.layers[0]).__name__ == "MixerCacheLayer"


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_real_token_in_copies_and_other_calls(side):
    student, tokens = hybrid(), tiny_tokens()
    alone, inputs = student(tokens).logits, padded(tokens, side)
    real = slice(3, None) if side == "left" else slice(0, 12)
    for one in (student, copy.deepcopy(student)):
        torch.testing.assert_close(one(**inputs).logits[:, real], alone, rtol=1e-4, atol=1e-4)
        positional = one.inner(inputs["input_ids"], inputs["attention_mask"]).logits[:, real]
        torch.testing.assert_close(positional, alone, rtol=1e-4, atol=1e-4)
        # A later call without a mask, of the same length, is read whole; so is one of the body alone.
        if side == "left":
            assert not torch.allclose(one(inputs["input_ids"]).logits[:, real], alone, atol=1e-2)
        body = one.body(**inputs).last_hidden_state[:, real]
        torch.testing.assert_close(body, student.body(tokens).last_hidden_state, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_call_that_fails_leaves_no_mask_behind():
    student, tokens = hybrid(), tiny_tokens()
    before = student(tokens).logits
    with pytest.raises(IndexError):
        student(input_ids=tokens + 1000, attention_mask=torch.zeros_like(tokens))
    assert torch.equal(student(tokens).logits, before)


def test_threads_have_masks_of_their_own():
    student, tokens = hybrid(), tiny_tokens()
    masks = [torch.ones_like(tokens), torch.cat((torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6).long()), 1)]
    with torch.no_grad():
        expected = [student(tokens, attention_mask=mask).logits for mask in masks]
    wrong = []

    def run(index):
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(student(tokens, attention_mask=masks[index]).logits, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_of_padded_rows(reentrant):
    plain, inputs = hybrid().train(), padded(tiny_tokens())
    saving = copy.deepcopy(plain)
    saving.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        saving.enable_input_require_grads()
    runs = {"n": 0}
    saving.mixer_list[0].register_forward_hook(lambda *_: runs.update(n=runs["n"] + 1))
    for student in (plain, saving):
        student(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert runs["n"] == 2
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
    if reentrant:
        with pytest.raises(ValueError, match="no gradient under reentrant checkpointing.*use_reentrant"):
            saving(**inputs, projections_callback=lambda *_: None)


def test_projections_are_shown_once_with_gradients_under_checkpointing():
    student = hybrid().train()
    student.activation_checkpointing_enable({"use_reentrant": False})
    shown = []
    student.read(input_ids=tiny_tokens(), projections_callback=lambda index, one: shown.append((index, one)))
    assert [index for index, _ in shown] == [0, 1]
    sum(one.B.square().sum() for _, one in shown).backward()
    assert all(mixer.in_proj.weight.grad.any() for mixer in student.mixer_list) and len(shown) == 2
    seen = student(tiny_tokens(), output_projections=True).projections
    assert [one.C.shape for one in seen] == [(2, 12, 4, 16)] * 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@torch.no_grad()
def test_packed_documents_are_kept_apart(family):
    student = hybrid(family)
    assert student.config.packs_documents
    tokens = tiny_tokens()
    seq_idx = torch.tensor([[0] * 5 + [1] * 7])
    alone = [student(part).logits for part in tokens.split([5, 7], dim=1)]
    torch.testing.assert_close(student(tokens, seq_idx=seq_idx).logits, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None].expand(2, -1)
    by_positions = student(tokens, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(by_positions, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)
    for given, said in (({"use_cache": True}, "use_cache=False"), ({"attention_mask": tokens * 0 + 1}, "pad single")):
        with pytest.raises(ValueError, match=f"seq_idx.*{said}"):
            student(tokens, seq_idx=seq_idx, **given)


def test_models_that_read_across_documents_refuse_packed_ones():
    student = hybrid_from_teacher(tiny_model("jamba"))
    assert not student.config.packs_documents
    with pytest.raises(ValueError, match="'jamba' hybrid read across packed documents.*attention_mask"):
        student(tiny_tokens(), seq_idx=torch.zeros(1, 12, dtype=torch.long))


@torch.no_grad()
def test_caches_that_can_not_hold_states_are_refused():
    student, tokens = hybrid(), tiny_tokens()
    with pytest.raises(ValueError, match="StaticLayer for layers.0.self_attn.*DynamicCache.*cache_implementation"):
        student(tokens, past_key_values=StaticCache(config=student.config, max_cache_len=30))
    with pytest.raises(ValueError, match="DynamicCache.*cache_implementation"):
        student(tokens, past_key_values=DynamicCache(config=student.config, offloading=True))
    with pytest.raises((ValueError, RuntimeError), match="can't be rolled back|cache that can be cropped"):
        student.generate(tokens[:1], assistant_model=tiny_model("llama"), **GREEDY)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@torch.no_grad()
def test_one_folder_loads_for_every_task(family, tmp_path):
    student, tokens = hybrid(family, **({"is_decoder": True} if family == "bert" else {})), tiny_tokens()
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is CABHybridForCausalLM and torch.equal(loaded(tokens).logits, student(tokens).logits)
    assert torch.equal(loaded.generate(tokens, **GREEDY), student.generate(tokens, **GREEDY))
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is CABHybridModel
    assert torch.equal(body(tokens)[0], student.body(tokens)[0])
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier) is CABHybridForSequenceClassification and classifier.config.num_labels == 3
    assert classifier(tokens[:1]).logits.shape == (1, 3)
    assert torch.equal(classifier.body(tokens)[0], student.body(tokens)[0])
    body.save_pretrained(tmp_path / "body")
    again = AutoModel.from_pretrained(tmp_path / "body")
    assert torch.equal(again(tokens)[0], body(tokens)[0])


def test_a_config_alone_builds_a_student_that_is_started():
    config = hybrid().config
    torch.manual_seed(0)
    fresh = CABHybridForCausalLM(CABHybridConfig.from_dict(config.to_dict()))
    for mixer in fresh.mixer_list:
        assert (mixer.D == 0).all() and (mixer.A_log == 0).all() and 0 < mixer.in_proj.weight.std() < 1
    assert torch.isfinite(fresh(tiny_tokens()).logits).all()
    assert fresh.mixers.keys() == config.mixers.keys() and isinstance(fresh.mixers["layers.0.self_attn"], MixerAdapter)


def test_what_all_mixers_share_stands_once(tmp_path):
    student = hybrid(kept=())
    student.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert list(saved["mixers"].values()) == [{"cache_layer": index} for index in range(4)]
    assert saved["mixer"]["num_heads"] == 4 and saved["teacher"]["architectures"] == ["LlamaForCausalLM"]


def test_a_folder_keeps_the_order_of_more_than_ten_mixers(tmp_path):
    student = hybrid(kept=(3,), num_hidden_layers=12)
    student.save_pretrained(tmp_path)
    loaded, calls = AutoModelForCausalLM.from_pretrained(tmp_path), []
    loaded(tiny_tokens(), projections_callback=lambda index, projections: calls.append(index))
    assert list(loaded.config.mixers) == list(student.config.mixers) and calls == list(range(11))
    assert loaded.config.layer_numbers == [number for number in range(12) if number != 3]


def test_configs_without_a_known_teacher_or_whole_mixers_are_refused():
    with pytest.raises(Exception, match="'unheard_of', which is none of this transformers'"):
        CABHybridConfig(teacher={"model_type": "unheard_of"})
    with pytest.raises(Exception, match="'cab_hybrid', which is none"):
        CABHybridConfig(teacher={"model_type": "cab_hybrid"})
    with pytest.raises(Exception, match="no num_heads, causal for 'layers.0.self_attn'"):
        CABHybridConfig(mixer={"hidden_size": 8}, mixers={"layers.0.self_attn": {"cache_layer": 0}})


ATTACK = "open({path!r}, 'w').close()\nfrom transformers import LlamaConfig as Evil, LlamaForCausalLM as EvilModel\n"


@pytest.mark.parametrize("trust", [False, True])
def test_a_nested_config_runs_no_code(trust, tmp_path):
    student = hybrid()
    student.save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(ATTACK.format(path=str(tmp_path / "was_here")))
    saved = json.loads((tmp_path / "config.json").read_text())
    code = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.EvilModel", "AutoModel": "evil.EvilModel"}
    saved["teacher"] |= {"auto_map": code, "_name_or_path": str(tmp_path)}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)
    assert "auto_map" not in json.dumps(config.teacher) and "auto_map" not in json.dumps(config.to_dict()["teacher"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
    assert torch.equal(loaded(tiny_tokens()).logits, student(tiny_tokens()).logits)
    assert not (tmp_path / "was_here").exists()
    part = {"auto_map": code, "size": 3}
    nested = CABHybridConfig(teacher={"model_type": "llama", "part": part, "parts": [part]})
    assert nested.teacher == {"model_type": "llama", "part": {"size": 3}, "parts": [{"size": 3}]}


def test_checkpointing_by_hand_sees_the_call_it_runs_in():
    student, inputs = hybrid(), padded(tiny_tokens())
    embeds = student.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    mask = inputs["attention_mask"]
    plain = student(inputs_embeds=embeds, attention_mask=mask).logits
    wrapped = checkpoint(lambda x: student(inputs_embeds=x, attention_mask=mask).logits, embeds, use_reentrant=False)
    gradients = [torch.autograd.grad(logits[:, 3:].square().sum(), embeds)[0] for logits in (plain, wrapped)]
    torch.testing.assert_close(*gradients)


def test_a_cache_goes_by_the_name_that_the_teachers_class_knows(recwarn):
    student, tokens = hybrid("llama"), tiny_tokens()
    right = student(tokens).logits[:, -1:]
    for name in ("cache", "past_key_values"):
        got = student(tokens[:, -1:], **{name: student(tokens[:, :-1], use_cache=True).cache}).logits
        torch.testing.assert_close(got, right, rtol=0, atol=1e-4)
    assert not [one for one in recwarn if "past_key_values" in str(one.message)]

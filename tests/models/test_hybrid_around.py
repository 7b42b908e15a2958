"""Hybrids in the hands of others: PEFT, pipelines, torch.compile, a Trainer, and a process without the package."""

import copy

import pytest
import torch
from processes import BLOCKED, run_apart
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithFlattening,
    TextGenerationPipeline,
    Trainer,
    TrainingArguments,
)

from cab_hf.evaluation.tiny_families import tiny_model, tiny_tokens
from cab_hf.lora import lora_config
from cab_hf.models.mixers import SSDMixer
from cab_hf.teachers.demo import random_llama
from cab_hf.transfer import student_from_teacher


GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def hybrid(family="llama"):
    return student_from_teacher(tiny_model(family), keep_attention=[1, 3])


WITHOUT_PACKAGE = (
    BLOCKED
    + """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

trust = {"trust_remote_code": True}
for folder in sys.argv[2:]:
    ids = load_file(f"{folder}/ids.safetensors")["ids"]
    config = AutoConfig.from_pretrained(folder, **trust)
    assert "transformers_modules" in type(config).__module__
    model = AutoModelForCausalLM.from_pretrained(folder, **trust)
    body = AutoModel.from_pretrained(folder, **trust)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        found = {"logits": model(ids, attention_mask=mask).logits, "hidden": body(ids)[0]}
    found["texts"] = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.save_pretrained(f"{folder}/again")
    again = AutoModelForCausalLM.from_pretrained(f"{folder}/again", **trust)
    with torch.no_grad():
        assert torch.equal(again(ids, attention_mask=mask).logits, found["logits"])
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **trust)
    classifier(ids[:1], labels=ids[:1, 0] % 3).loss.backward()
    save_file(found, f"{folder}/out.safetensors")
assert not any(name.partition(".")[0] in BLOCKED for name in sys.modules)
"""
)


def test_a_folder_is_enough_without_the_package(tmp_path):
    folders, students = [], []
    for family in ("llama", "gemma2", "gpt_oss"):
        students.append(hybrid(family))
        folders.append(tmp_path / family)
        students[-1].save_pretrained(folders[-1])
        save_file({"ids": tiny_tokens()}, folders[-1] / "ids.safetensors")
    run_apart(WITHOUT_PACKAGE, "cab_hf,mamba_ssm,causal_conv1d,triton,fla", folders, tmp_path)
    tokens = tiny_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    for folder, student in zip(folders, students, strict=True):
        found = load_file(folder / "out.safetensors")
        with torch.no_grad():
            assert torch.equal(found["logits"], student(tokens, attention_mask=mask).logits)
            assert torch.equal(found["hidden"], student.body(tokens)[0])
        assert torch.equal(found["texts"], student.generate(tokens, **GREEDY))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_reaches_mixers_mlps_and_kept_attention(tmp_path):
    peft = pytest.importorskip("peft")
    student, tokens = hybrid(), tiny_tokens()
    model = peft.get_peft_model(copy.deepcopy(student), lora_config(student))
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    for part in ("mixer.in_proj", "mixer.out_proj", "mlp.up_proj", "self_attn.q_proj"):
        assert any(part in name for name in trained), part
    for name, p in trained.items():
        if "lora_B" in name:
            p.data.normal_(std=0.02)
    model.eval()
    padded = {"input_ids": tokens, "attention_mask": torch.cat((tokens[:, :2] * 0, tokens[:, 2:] * 0 + 1), 1)}
    texts, logits = model.generate(**padded, **GREEDY), model(**padded).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**padded).logits, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(**padded, **GREEDY), texts)


def test_pipelines_write_padded_batches_as_single_texts():
    teacher, tokenizer = random_llama()
    student = student_from_teacher(teacher, keep_attention=1)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    write = TextGenerationPipeline(model=student, tokenizer=tokenizer)
    prompts = ["a b", "a much longer text than that"]
    settings = {"max_new_tokens": 5, "do_sample": False}
    together = write(prompts, batch_size=2, **settings)
    assert [one[0]["generated_text"] for one in together] == [
        write(prompt, **settings)[0]["generated_text"] for prompt in prompts
    ]


@torch.no_grad()
def test_torch_compile_gives_the_same_with_and_without_padding():
    student, tokens = hybrid(), tiny_tokens()
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    mask = torch.cat((tokens[:, :2] * 0, tokens[:, 2:] * 0 + 1), 1)
    for inputs in ({}, {"attention_mask": mask}, {}):
        expected = student(tokens, use_cache=False, **inputs).logits
        torch.testing.assert_close(compiled(tokens, use_cache=False, **inputs).logits, expected)


def test_torch_compile_in_pieces_shows_the_same_projections(monkeypatch):
    student, tokens = hybrid().train(), tiny_tokens()

    def loss():
        outputs = []
        last = student.read(input_ids=tokens, projections_callback=lambda _, shown: outputs.append(shown.output))
        return last.last_hidden_state.square().mean() + sum(output.square().mean() for output in outputs)

    right = loss()
    forward = SSDMixer.forward

    def interrupted(mixer, *args, **kwargs):
        torch._dynamo.graph_break()  # as a kernel does that the compiler can't look into
        return forward(mixer, *args, **kwargs)

    monkeypatch.setattr(SSDMixer, "forward", interrupted)
    compiled = torch.compile(loss, backend="eager")
    for _ in range(2):
        got = compiled()
        torch.testing.assert_close(got, right)
    got.backward()
    assert student.mixer_list[0].in_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plain_trainer_trains_packed_rows_and_loads_its_checkpoint(checkpointing, tmp_path):
    student = hybrid()
    saving = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    saving = saving if checkpointing else {}
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **saving,
    )
    rows = [{"input_ids": tiny_tokens()[index % 2, : 5 + index % 3].tolist()} for index in range(16)]
    trainer = Trainer(student, args, train_dataset=rows, data_collator=DataCollatorWithFlattening())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_model(str(tmp_path / "last"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "last")
    assert torch.equal(loaded(tiny_tokens()).logits, student.eval()(tiny_tokens()).logits)


def test_a_classifier_trains_on_padded_rows(tmp_path):
    hybrid().save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    tokens = tiny_tokens()
    inputs = {"input_ids": torch.cat((tokens, tokens[:, :3] * 0), 1)}
    inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    model.inner.config.pad_token_id = 0
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    model.train()(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    assert all(mixer.in_proj.weight.grad.any() for mixer in model.mixer_list)

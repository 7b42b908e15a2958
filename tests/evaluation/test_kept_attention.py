"""Which attention a hybrid keeps: the choice against each layer tried, and its scores against students made anew."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cab_hf import DistillationTrainer, DistillationTrainingArguments, student_from_teacher
from cab_hf.evaluation import choose_attention, copying_recall
from cab_hf.evaluation.plots import kept_attention
from cab_hf.evaluation.tiny_families import tiny_model, tiny_tokens
from cab_hf.transfer import attention_for, put_back


VOCABULARY, GAPS, SPAN = 64, (4, 8, 16), 16
FAST = {"gaps": [2], "length": 8, "progress": False}


def repeats(count: int, generator: torch.Generator, varied: bool = False) -> torch.Tensor:
    """Rows of 20 random tokens, a gap of 8, or of 0 to 8, and the same 20."""
    copied, others = (torch.randint(VOCABULARY, (count, length), generator=generator) for length in (20, 8))
    gap = int(torch.randint(9, (1,), generator=generator)) if varied else 8
    return torch.cat([copied, others[:, :gap], copied], 1)


def copying_teacher(generator: torch.Generator, steps: int = 800) -> LlamaForCausalLM:
    """Three layers that learnt to copy: early ones tell each token what stood before it, the last one finds it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, max_position_embeddings=128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    for _ in range(steps):
        rows = repeats(32, generator, varied=True)
        labels = rows.clone()
        labels[:, :-19] = -100
        model(rows, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def distil(student, teacher, rows, folder, **stages):
    """Outputs first, then KL, for as many steps as are given."""
    losses = {"outputs": {"output_weight": 1.0, "kl_weight": 0.0}, "kl": {}}
    for name, steps in stages.items():
        args = DistillationTrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            bridge_weight=0.0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            **losses[name],
        )
        DistillationTrainer(student, teacher, args, train_dataset=rows).train()
    return student


def copied(model) -> float:
    one = [copying_recall(model, VOCABULARY, gap, length=SPAN, n=32, progress=False)["recall"] for gap in GAPS]
    return sum(one) / len(one)


@torch.no_grad()
def divergence(student, teacher, rows: torch.Tensor) -> float:
    """KL(teacher || student) a predicted token, by its definition."""
    ours, theirs = (model(rows).logits[:, :-1].double().log_softmax(-1) for model in (student, teacher))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.mark.slow
def test_the_layer_that_copies_is_found_as_distilling_with_each_finds_it(tmp_path):
    generator = torch.Generator().manual_seed(1)
    teacher = copying_teacher(generator)
    assert copied(teacher) > 0.95
    rows = [{"input_ids": row, "labels": row} for row in repeats(1024, generator)]
    start = {"data": [{"input_ids": repeats(64, generator)}]}
    tried = {}
    for layer in range(3):
        student = student_from_teacher(teacher, keep_attention=[layer], **start)
        tried[layer] = copied(distil(student, teacher, rows, tmp_path, outputs=100, kl=60))
    best = max(tried, key=tried.get)
    others = max(value for layer, value in tried.items() if layer != best)
    assert tried[best] > others + 0.2, tried

    student = student_from_teacher(teacher, keep_attention=0, **start)
    distil(student, teacher, rows, tmp_path, outputs=100)
    attention, text = attention_for(student, teacher), repeats(32, generator)
    options = {"gaps": GAPS, "length": SPAN, "progress": False}
    for by in ("both", "copying"):
        choice = choose_attention(student, teacher, attention, 1, text, VOCABULARY, by=by, **options)
        assert choice["layers"] == [best], (by, choice["replaced"])
    before = copied(student)
    put_back(student, {path: attention[path] for path in choice["kept"]})
    assert copied(student) > 2 * before
    ended = copied(distil(student, teacher, rows, tmp_path, kl=60))
    assert ended > others + 0.2, (ended, tried)


@pytest.mark.parametrize("by", ["both", "kl", "copying"])
def test_every_score_is_that_of_a_student_made_anew_and_the_best_is_taken(by):
    teacher, rows = tiny_model("llama"), tiny_tokens()
    student = student_from_teacher(teacher, keep_attention=0, data=())
    with torch.no_grad():  # as if it had been aligned: nothing is the teacher's any more
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    attention, before = attention_for(student, teacher), copy.deepcopy(student.state_dict())
    choice = choose_attention(student, teacher, attention, 2, rows, 110, by=by, **FAST)
    assert choice["paths"] == list(attention) == list(student.mixers)
    after = student.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    def anew(paths):
        fresh = student_from_teacher(teacher, keep_attention=paths, data=())
        rest = {name: one for name, one in before.items() if not any(f".{path}." in name for path in paths)}
        missing, unexpected = fresh.load_state_dict(rest, strict=False)
        assert not unexpected and all(any(f".{path}." in name for path in paths) for name in missing)
        recall = copying_recall(fresh, 110, 2, length=8, n=16, progress=False)["recall"]
        return {"kl": pytest.approx(divergence(fresh, teacher, rows), rel=1e-4, abs=1e-6), "copying": recall}

    left = list(attention)
    for number, one in enumerate(choice["rounds"]):
        assert one["left"] == left == list(one["replaced"])
        now = {name: one[name] for name in ("kl", "copying")}
        if number:  # with all attention in its place there is no mixer to make anew
            assert now == anew(left)
        for path, found in one["replaced"].items():
            assert found == anew([other for other in left if other != path])
        surely = now["copying"] - 2 * (now["copying"] * (1 - now["copying"]) / choice["n_copied"]) ** 0.5
        costs = {
            "kl": [max(found["kl"] - now["kl"], 0) for found in one["replaced"].values()],
            "copying": [max(surely - found["copying"], 0) for found in one["replaced"].values()],
        }
        costs["both"] = [sum(cost[at] / (sum(cost) or 1) for cost in costs.values()) for at in range(len(left))]
        left.pop(min(range(len(left)), key=lambda at: (costs[by][at], costs["kl"][at])))
    assert choice["kept"] == left and len(left) == 2
    assert choice["chosen"] == anew(left)
    assert choice["replaced"] == choice["rounds"][0]["replaced"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_attention_that_is_put_back_is_the_hybrid_that_kept_it(family, tmp_path):
    teacher, tokens = tiny_model(family), tiny_tokens()
    student = student_from_teacher(teacher, keep_attention=0, data=(), accept_inexact=1.0)
    attention = attention_for(student, teacher)
    chosen = [path for index, path in enumerate(attention) if index in (0, 2)]
    put_back(student, {path: attention[path] for path in chosen})
    fresh = student_from_teacher(teacher, keep_attention=[0, 2], data=(), accept_inexact=1.0)
    assert list(student.mixers) == list(fresh.mixers)
    for name in ("has_plain_head", "packs_documents", "num_hidden_layers", "layer_numbers"):
        assert getattr(student.config, name) == getattr(fresh.config, name), name
    torch.testing.assert_close(student(tokens).logits, fresh(tokens).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(student.generate(tokens, max_new_tokens=4), fresh.generate(tokens, max_new_tokens=4))
    module = student.body.get_submodule(chosen[0])
    assert not hasattr(module, "config") or module.config is student.body.config
    assert all(parameter.requires_grad for parameter in student.parameters())
    theirs = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in student.parameters()}
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, student(tokens).logits)


def test_evenly_takes_what_n_takes_and_a_picture_shows_it(tmp_path):
    teacher, rows = tiny_model("llama"), tiny_tokens()
    student = student_from_teacher(teacher, keep_attention=0, data=())
    attention = attention_for(student, teacher)
    choice = choose_attention(student, teacher, attention, 2, rows, 110, by="evenly", **FAST)
    assert choice["layers"] == [1, 3] and choice["kept"] == [choice["paths"][layer] for layer in (1, 3)]
    assert kept_attention(choice, tmp_path / "kept.png").stat().st_size > 10_000
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"choose {count} of 4 layers.*1 to 3"):
            choose_attention(student, teacher, attention, count, rows, 110, **FAST)
    with pytest.raises(ValueError, match="`by` is 'recall'.*'copying'"):
        choose_attention(student, teacher, attention, 1, rows, 110, by="recall", **FAST)

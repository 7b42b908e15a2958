"""A recorded teacher teaches as the teacher itself does, and says so where it can't."""

import gc
import json
import math
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_distillation import (
    NO_LOSS,
    SIX_LOSSES,
    VOCAB,
    assert_gradients_close,
    assert_logs_close,
    make_trainer,
    ragged_rows,
    tiny_teacher,
)
from transformers import LlamaForCausalLM, default_data_collator
from transformers.utils import logging

from cab_hf import RecordedTeacher, Teacher, record_teacher
from cab_hf.data.packing import LanguageCollator
from cab_hf.teachers.recorded_teacher import RecordedHead, documents


ROWS = ragged_rows()
EVERYTHING = {"top_k": VOCAB, "attentions": True, "hidden_states": True, "dtype": "float32"}


def record(folder, teacher=None, rows=ROWS, collator=default_data_collator, **options):
    teacher = Teacher(tiny_teacher()) if teacher is None else teacher
    options = {**EVERYTHING, "batch_size": 3, "batches_per_shard": 1, "progress": False, **options}
    return record_teacher(teacher, rows, folder, data_collator=collator, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    record(folder)
    return folder


@pytest.fixture
def asked(monkeypatch):
    """Counts the teacher's forward passes."""
    calls, forward = [], Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    return calls


def test_all_tokens_teach_as_the_teacher_does(whole, tmp_path):
    """Every loss but that of maps, over rows padded on the other side and batches of another size."""
    options = {
        **SIX_LOSSES,
        "attention_weight": 0.0,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "eval_dataset": ragged_rows((3, 9)),
    }
    rows = ragged_rows(side="left", pad_seed=7)
    results = {}
    teachers = {"live": Teacher(tiny_teacher()), "recorded": record(whole, rows=options["eval_dataset"])}
    for name, teacher in teachers.items():
        trainer, recorder = make_trainer(tmp_path / name, rows=rows, teacher=teacher, **options)
        trainer.train()
        results[name] = recorder.gradients, recorder.logs, trainer.evaluate()
    (gradients, logs, metrics), (recorded_gradients, recorded_logs, recorded_metrics) = results.values()
    for left, right in zip(recorded_gradients, gradients, strict=True):
        assert_gradients_close(left, right)
    for step in range(3):
        nothing = {"attention": 0.0}
        assert_logs_close(recorded_logs[step] | nothing, logs[step] | nothing, 1e-6)
    for name in ("eval_kl", "eval_agreement", "eval_perplexity", "eval_teacher_perplexity", "eval_bridge"):
        assert recorded_metrics[name] == pytest.approx(metrics[name], rel=1e-5), name


def test_no_teacher_is_loaded(whole, tmp_path):
    gc.collect()
    before = sum(isinstance(one, LlamaForCausalLM) for one in gc.get_objects())
    trainer, recorder = make_trainer(tmp_path, teacher=RecordedTeacher(whole), kl_weight=1.0, bridge_weight=1.0)
    trainer.train()
    assert recorder.logs[0]["kl"] > 0.1 and recorder.logs[0]["bridge"] > 0.1
    assert sum(isinstance(one, LlamaForCausalLM) for one in gc.get_objects()) == before


def test_what_few_tokens_leave_is_spread_evenly():
    probabilities = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]])
    best = probabilities.log().topk(2)
    found = RecordedHead(5, 2)(torch.cat([best.indices.float(), best.values], dim=-1)).softmax(-1)
    assert torch.allclose(found, torch.tensor([[0.5, 0.3, 0.2 / 3, 0.2 / 3, 0.2 / 3]]))


def test_fewer_tokens_are_nearly_the_teacher(tmp_path):
    """The KL of k recorded tokens, by hand, and nearer to the teacher's the more there are."""
    kls = {}
    for k in (1, 20, VOCAB):
        teacher = record(tmp_path / str(k), top_k=k, attentions=False, hidden_states=False)
        options = {**NO_LOSS, "kl_weight": 1.0, "rows": ROWS[:1], "learning_rate": 0.0}
        trainer, recorder = make_trainer(tmp_path / "run", teacher=teacher, **options)
        trainer.train()
        kls[k] = recorder.logs[0]["kl"]
    ids = ROWS[0]["input_ids"][None]
    with torch.no_grad():
        theirs = tiny_teacher().eval()(ids).logits[:, :-1].softmax(-1)
        ours = trainer.student.eval()(ids).logits[:, :-1].log_softmax(-1)
    for k, kl in kls.items():
        kept = torch.zeros_like(theirs).scatter(-1, theirs.topk(k).indices, 1.0)
        left = (theirs * (1 - kept)).sum(-1, keepdim=True) / max(VOCAB - k, 1)
        smoothed = torch.where(kept > 0, theirs, left)
        expected = (smoothed * (smoothed.log() - ours)).sum(-1).mean().item()
        assert kl == pytest.approx(expected, rel=1e-4)
    assert abs(kls[20] - kls[VOCAB]) < abs(kls[1] - kls[VOCAB])


def test_a_recording_that_was_cut_off_goes_on(tmp_path, asked, whole):
    def cut_off(rows):
        if torch.equal(rows[0]["input_ids"], ROWS[6]["input_ids"]):
            raise KeyboardInterrupt
        return default_data_collator(rows)

    teacher = Teacher(tiny_teacher())
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, teacher, collator=cut_off)
    assert len(RecordedTeacher(tmp_path)) == 6 and len(asked) == 2
    # An unfinished file of a killed process is no shard.
    shutil.copy(next(tmp_path.glob("shard-*")), tmp_path / ".shard-00002.safetensors")
    again = record(tmp_path, teacher)
    assert (
        len(asked) == 3 and len(again) == 8 and again.num_tokens == sum(int(r["attention_mask"].sum()) for r in ROWS)
    )
    batch = default_data_collator(ROWS)
    for mine, theirs in zip(
        again(batch, attentions=True).attentions, RecordedTeacher(whole)(batch, attentions=True).attentions
    ):
        assert torch.equal(mine.query, theirs.query) and torch.equal(mine.output, theirs.output)
    record(tmp_path, teacher)
    assert len(asked) == 3


def test_packed_documents_are_found_one_by_one(tmp_path):
    """Recorded apart, taught packed."""
    torch.manual_seed(0)
    first, second = torch.randint(VOCAB, (5,)), torch.randint(VOCAB, (8,))
    collator = LanguageCollator(0)
    teacher = Teacher(tiny_teacher())
    record(tmp_path, teacher, rows=[{"input_ids": first.tolist()}, {"input_ids": second.tolist()}], collator=collator)
    packed = {"input_ids": torch.cat([first, second])[None], "seq_idx": torch.tensor([[0] * 5 + [1] * 8])}
    assert [len(one.places) for one in documents(packed)] == [5, 8]
    read = RecordedTeacher(tmp_path)
    live, found = teacher(packed, attentions=True), read(packed, attentions=True)
    for mine, theirs in zip(found.attentions, live.attentions, strict=True):
        assert torch.allclose(mine.key[..., 0:5, :], theirs.key[..., 0:5, :], atol=1e-6)
        assert torch.allclose(mine.output, theirs.output, atol=1e-5)
    expected = teacher.head(live.last_hidden_state).log_softmax(-1)
    assert torch.allclose(read.head(found.last_hidden_state).log_softmax(-1), expected, atol=1e-5)


def test_half_precision_is_smaller_and_near(whole, tmp_path):
    half = record(tmp_path, dtype="float16")
    sizes = [sum(path.stat().st_size for path in folder.glob("shard-*")) for folder in (whole, tmp_path)]
    assert sizes[1] < 0.75 * sizes[0]
    batch = default_data_collator(ROWS[:2])
    rows = half(batch).last_hidden_state, RecordedTeacher(whole)(batch).last_hidden_state
    probabilities = [half.head(one).softmax(-1) for one in rows]
    assert torch.allclose(*probabilities, atol=1e-3)


def test_a_batch_without_real_tokens_is_no_error(whole):
    batch = default_data_collator(ragged_rows((0, 0)))
    output = RecordedTeacher(whole)(batch, attentions=True, hidden_states=True)
    assert output.last_hidden_state.shape == (2, 11, 2 * VOCAB) and not output.last_hidden_state.any()
    assert output.attentions[3].query.shape == (2, 4, 11, 8) and len(output.hidden_states) == 5


class TestErrors:
    def test_a_recording_that_ended_before_its_first_shard(self, tmp_path):
        teacher = record(tmp_path, rows=[])
        with pytest.raises(ValueError, match="holds 0 documents"):
            teacher(default_data_collator(ROWS[:2]))

    def test_another_teacher_or_other_options(self, whole):
        with pytest.raises(ValueError, match="teacher_weights is '.*' there and '.*' now"):
            record(whole, Teacher(tiny_teacher(seed=5)))
        with pytest.raises(ValueError, match="top_k is 61 there and 4 now"):
            record(whole, top_k=4)

    def test_unknown_rows(self, whole, tmp_path):
        with pytest.raises(ValueError, match="document of 11 tokens, .* is not in the record .* call record_teacher"):
            trainer, _ = make_trainer(tmp_path, rows=ragged_rows(seed=3), teacher=RecordedTeacher(whole))
            trainer.train()

    def test_targets_that_were_not_recorded(self, tmp_path):
        teacher = record(tmp_path / "record", attentions=False, hidden_states=False)
        with pytest.raises(ValueError, match="attentions, which .* does not hold"):
            trainer, _ = make_trainer(tmp_path, teacher=teacher, **{**NO_LOSS, "bridge_weight": 1.0})
            trainer.train()

    def test_rotary_and_graphs(self, whole, tmp_path):
        with pytest.raises(ValueError, match="`remove_rotary` is True .* made with False"):
            make_trainer(tmp_path, teacher=RecordedTeacher(whole), remove_rotary=True)
        with pytest.raises(ValueError, match="`cuda_graph` is True"):
            make_trainer(tmp_path, teacher=RecordedTeacher(whole), cuda_graph=True)
        with pytest.raises(ValueError, match="`attention_weight` is 1.0, but a record holds no attention maps"):
            make_trainer(tmp_path, teacher=RecordedTeacher(whole), attention_weight=1.0)

    @pytest.mark.parametrize(
        "options, message", [({"top_k": 62}, "top_k is 62"), ({"top_k": 0}, "top_k is 0"), ({"dtype": "int8"}, "int8")]
    )
    def test_options(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            record(tmp_path, **options)

    def test_no_record(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="record_teacher"):
            RecordedTeacher(tmp_path)

    def test_numbers_too_large(self, tmp_path):
        model = tiny_teacher()
        model.get_input_embeddings().weight.data *= 1e6
        with pytest.raises(OverflowError, match="hidden.0 holds numbers too large for float16"):
            record(tmp_path, Teacher(model), dtype="float16")


def test_a_record_says_what_it_is_of(whole):
    facts = json.loads((whole / "index.json").read_text())
    assert facts["teacher"] == "LlamaForCausalLM" and len(facts["teacher_weights"]) == 64
    assert math.isclose(facts["scalings"][0], 8**-0.5)


class TestOfAnotherTeacherOrDamaged:
    @pytest.mark.parametrize(
        "config",
        [
            {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}},
            {"rms_norm_eps": 0.5},
            {"hidden_act": "relu"},
        ],
    )
    def test_the_same_weights_under_another_config(self, tmp_path, config):
        record(tmp_path)
        (name,) = config
        with pytest.raises(ValueError, match=rf"another teacher.*teacher_config\.{name} is .* there and .* now"):
            record(tmp_path, Teacher(tiny_teacher(**config)), rows=ROWS + ragged_rows(seed=5))

    def test_what_computes_nothing_may_differ(self, tmp_path):
        record(tmp_path)
        model = tiny_teacher()
        model.config.update(
            {"pad_token_id": 3, "use_cache": False, "initializer_range": 0.7, "attention_dropout": 0.1}
        )
        record(tmp_path, Teacher(model), rows=ragged_rows(seed=5))

    @pytest.mark.parametrize("keeps_metadata", [True, False])
    @pytest.mark.parametrize("name", ["log_probabilities", "indices", "hidden.1", "attention.0.key"])
    def test_an_edited_shard(self, tmp_path, name, keeps_metadata):
        record(tmp_path)
        shard = sorted(tmp_path.glob("shard-*"))[0]
        with safe_open(shard, "pt") as tensors:
            metadata = tensors.metadata() if keeps_metadata else None
        tensors = load_file(shard)
        save_file({**tensors, name: tensors[name].flip(0).contiguous()}, shard, metadata=metadata)
        with pytest.raises(ValueError, match=f"{shard.name} .*edited"):
            RecordedTeacher(tmp_path)(default_data_collator(ROWS))

    @pytest.mark.parametrize("options", [{"attentions": False}, {"top_k": 5}, {}])
    def test_a_foreign_shard(self, tmp_path, options):
        record(tmp_path / "r")
        record(tmp_path / "other", Teacher(tiny_teacher(seed=4)), rows=ragged_rows(seed=9), **options)
        shutil.copy(sorted((tmp_path / "other").glob("shard-*"))[0], tmp_path / "r/shard-00077.safetensors")
        with pytest.raises(ValueError, match="shard-00077.safetensors was not written into this record"):
            RecordedTeacher(tmp_path / "r")

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
    def test_a_cut_shard(self, tmp_path, share):
        record(tmp_path)
        shard = sorted(tmp_path.glob("shard-*"))[1]
        shard.write_bytes(shard.read_bytes()[: int(share * shard.stat().st_size)])
        with pytest.raises(ValueError, match=f"{shard.name} .* is cut off"):
            RecordedTeacher(tmp_path)

    @pytest.mark.parametrize("text", ["", '{"a"', "[1]", "{}", '{"top_k": 3}'])
    def test_a_broken_index(self, tmp_path, text):
        record(tmp_path)
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index\.json (is damaged|holds a list|lacks )"):
            RecordedTeacher(tmp_path)

    def test_a_record_of_before_is_read_with_a_warning_and_gone_on_with(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
        monkeypatch.setattr(logging.get_logger("cab_hf"), "propagate", True)
        record(tmp_path)
        facts = json.loads((tmp_path / "index.json").read_text())
        del facts["teacher_config"]
        (tmp_path / "index.json").write_text(json.dumps(facts))
        for shard in tmp_path.glob("shard-*"):
            save_file(load_file(shard), shard)
        said = RecordedTeacher(tmp_path)(default_data_collator(ROWS))
        assert "checked by the teacher's weights only" in caplog.text
        record(tmp_path, rows=ROWS + ragged_rows(seed=5))
        again = RecordedTeacher(tmp_path)(default_data_collator(ROWS))
        assert torch.equal(said.last_hidden_state, again.last_hidden_state)
        with pytest.raises(ValueError, match="teacher_weights"):
            record(tmp_path, Teacher(tiny_teacher(seed=4)))

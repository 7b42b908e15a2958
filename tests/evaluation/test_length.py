"""Loss and retrieval over length: pieces against whole rows, models made to find, and the held length by hand."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model
from torch.nn import functional as F
from transformers import LlamaConfig, PreTrainedModel

from cab_hf.evaluation.language import logits_in_pieces
from cab_hf.evaluation.length import RETRIEVAL, held_length, limits_of, loss_by_position, retrieval
from cab_hf.evaluation.needles import key_value_recall, needle_recall
from cab_hf.evaluation.recall import copying_recall
from cab_hf.evaluation.tiny_families import tiny_model as tiny_family
from cab_hf.teachers.demo import random_llama
from cab_hf.transfer.hybrid import hybrid_from_teacher


# Letters of one byte each.
TEXT = torch.randint(70, 90, (3000,), generator=torch.Generator().manual_seed(0))


class Finder(PreTrainedModel):
    """Predicts what followed the last earlier place with the same `suffix` tokens, and token 0 where there is none."""

    config_class = LlamaConfig

    def __init__(self, suffix: int = 12) -> None:
        super().__init__(LlamaConfig(vocab_size=257))
        self.suffix, self.seen = suffix, []
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, 257)
        for row, tokens in enumerate(input_ids.tolist()):
            self.seen.append(tokens)
            last = {}
            for now in range(self.suffix - 1, len(tokens)):
                suffix = tuple(tokens[now + 1 - self.suffix : now + 1])
                logits[row, now, tokens[last[suffix] + 1] if suffix in last else 0] = 9.0
                last[suffix] = now
        return SimpleNamespace(logits=logits)


def models() -> dict[str, PreTrainedModel]:
    return {
        "ssd": tiny_model(mixer_type="mamba2", vocab_size=257),
        "s6, positions": tiny_model(mixer_type="mamba", vocab_size=257, max_position_embeddings=40),
        "llama": random_llama()[0].eval(),
        "hybrid": hybrid_from_teacher(tiny_family("llama"), keep_attention=[1]).eval(),
    }


@pytest.mark.parametrize("name", ["ssd", "s6, positions", "llama", "hybrid"])
@pytest.mark.parametrize("first", [0, 9, 17, 30])
@torch.no_grad()
def test_pieces_are_the_whole(name, first):
    model = models()[name]
    tokens = torch.randint(1, 99, (2, 33), generator=torch.Generator().manual_seed(1))
    expected, at = model(tokens, use_cache=False).logits[:, first:], first
    found = []
    for start, logits in logits_in_pieces(model, tokens, first, piece=8):
        assert start == at and logits.shape[1] <= 8
        at += logits.shape[1]
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["ssd", "llama"])
def test_only_the_logits_that_are_asked_for_are_made(name):
    model, made = models()[name], []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: made.append(output.shape[1]))
    copying_recall(model, 99, 20, length=8, n=2, progress=False)
    assert max(made) == made[-1] == 8  # of 36


@torch.no_grad()
def test_a_model_whose_layers_begin_anew_in_each_piece_is_read_whole():
    model, tokens = tiny_family("jamba"), torch.randint(1, 99, (2, 33), generator=torch.Generator().manual_seed(1))
    found = list(logits_in_pieces(model, tokens, 9, piece=8))
    assert [start for start, _ in found] == [9]
    torch.testing.assert_close(found[0][1], model(tokens, use_cache=False).logits[:, 9:])


def test_recall_in_pieces_is_recall(monkeypatch):
    student = tiny_model(mixer_type="mamba2", vocab_size=30)
    whole = copying_recall(student, 30, 20, length=8, progress=False)
    monkeypatch.setattr("cab_hf.evaluation.recall.logits_in_pieces", partial(logits_in_pieces, piece=10))
    assert copying_recall(student, 30, 20, length=8, progress=False) == whole


class TestNeedles:
    @pytest.mark.parametrize("needles", [1, 4])
    def test_a_model_that_finds(self, needles):
        tokenizer, model = random_llama()[1], Finder()
        found = needle_recall(model, tokenizer, TEXT, 600, needles=needles, n=5, batch_size=2, progress=False)
        assert found["recall"] == 1.0 and found["n_needles"] == 5 * needles and found["n_sequences"] == 5
        rows = [row for row in model.seen if len(row) == 600]
        assert len(rows) == 5
        texts, places = [tokenizer.decode(row) for row in rows], []
        for text in texts:
            assert text.count(" The magic number of the ") == text.count(" Again: the magic number of the ") == needles
            places.append(text.index(" The magic number of the "))
        if needles == 1:
            # From the very beginning to the very end of the text, evenly.
            tail = [len(text) - text.index(" Again") for text in texts]
            sentence = [text.index(".", place) + 1 - place for text, place in zip(texts, places)]
            room = [600 - one - other for one, other in zip(tail, sentence)]
            assert [round(place / all_of_it, 2) for place, all_of_it in zip(places, room)] == [0, 0.25, 0.5, 0.75, 1]

    def test_one_wrong_token_is_a_needle_lost(self):
        class Forgetful(Finder):
            """Knows all digits but 7."""

            def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
                output = super().forward(input_ids, use_cache)
                output.logits[..., seven] = -1.0
                return output

        tokenizer = random_llama()[1]
        (seven,), model = tokenizer("7")["input_ids"], Forgetful()
        found = needle_recall(model, tokenizer, TEXT, 300, n=20, progress=False)
        rows = [tokenizer.decode(row) for row in model.seen if len(row) == 300]
        numbers = [row.rsplit(" is ", 1)[1] for row in rows]
        assert found["recall"] == pytest.approx(sum("7" not in number for number in numbers) / 20)
        assert 0 < found["recall"] < 1

    def test_errors(self):
        tokenizer = random_llama()[1]
        with pytest.raises(ValueError, match="length is 60, but what is told and asked takes"):
            needle_recall(Finder(), tokenizer, TEXT, 60, n=1)
        with pytest.raises(ValueError, match="text has no tokens"):
            needle_recall(Finder(), tokenizer, TEXT[:0], 600, n=1)
        with pytest.raises(ValueError, match="40 numbers to find, and 32 words"):
            key_value_recall(Finder(), tokenizer, TEXT, 6000, pairs=40)


def test_keys_and_their_values():
    tokenizer, model = random_llama()[1], Finder(7)
    found = key_value_recall(model, tokenizer, TEXT, 300, pairs=3, n=5, progress=False)
    assert found["recall"] == 1.0 and found["n_needles"] == 15 and found["length"] == 300
    for text in (tokenizer.decode(row) for row in model.seen if len(row) == 300):
        nothing, *lines = text.split("\n")
        told, (between, *asked) = lines[:3], lines[3:]
        assert not nothing and len(between) > 100 and sorted(told) == sorted(asked) and len(set(told)) == 3
    assert key_value_recall(models()["ssd"], tokenizer, TEXT, 300, progress=False)["recall"] == 0


def test_loss_by_position_is_that_of_the_rows():
    teacher, student = random_llama()[0].eval(), tiny_model(mixer_type="mamba2", vocab_size=257)
    both = {"teacher": teacher, "student": student}
    found = loss_by_position(both, TEXT, 1100, limits={"teacher": 200, "student": None}, batch_size=2)
    assert found["length"] == 1100 and found["n_rows"] == 2
    spans = [(one["from"], one["to"]) for one in found["buckets"]]
    assert spans == [(1, 64), (64, 128), (128, 256), (256, 512), (512, 1024), (1024, 1100)]
    rows = TEXT[:2200].view(2, 1100)
    with torch.no_grad():
        logits = student(rows).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").double()
    means = [losses[:, start - 1 : end - 1].mean(1) for start, end in spans]  # t + 1 tokens stand before that at t
    assert [one["student"]["nll"] for one in found["buckets"]] == pytest.approx(
        [float(m.mean()) for m in means], abs=1e-5
    )
    # The teacher's limit is within the third bucket.
    assert [one["teacher"] is None for one in found["buckets"]] == [False, False, True, True, True, True]
    rise = means[4] - means[3]
    assert found["buckets"][4]["rise"] == pytest.approx(float(rise.mean()), abs=1e-5)
    error = 12.7062 * float(rise.std()) / math.sqrt(2)  # Student's t of two rows
    assert found["buckets"][4]["rise_ci95"][1] == pytest.approx(float(rise.mean()) + error, abs=1e-4)
    assert "rise" not in found["buckets"][3] and "difference" in found["buckets"][1]
    assert not any("difference_rise" in bucket for bucket in found["buckets"])  # the teacher is not measured there
    assert loss_by_position({"student": student}, TEXT, 8000)["length"] == 1000  # two rows are needed
    with pytest.raises(ValueError, match="The text has 90 tokens"):
        loss_by_position({"student": student}, TEXT[:90], 64)


def test_the_rise_of_a_difference_is_paired():
    teacher, student = random_llama()[0].eval(), tiny_model(mixer_type="mamba2", vocab_size=257)
    found = loss_by_position({"teacher": teacher, "student": student}, TEXT, 700)["buckets"]
    rows, losses = TEXT[:2800].view(4, 700), []
    with torch.no_grad():
        for model in (student, teacher):
            logits = model(rows).logits[:, :-1]
            losses.append(F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").double())
    difference = losses[0] - losses[1]
    rise = difference[:, 511:699].mean(1) - difference[:, 255:511].mean(1)
    assert found[-1]["difference"] == pytest.approx(float(difference[:, 511:699].mean()), abs=1e-5)
    assert found[-1]["difference_rise"] == pytest.approx(float(rise.mean()), abs=1e-5)
    low, high = found[-1]["difference_rise_ci95"]
    assert high - low == pytest.approx(2 * 3.1824 * float(rise.std()) / 2, rel=1e-2, abs=1e-5)


def test_retrieval_at_a_length():
    model, tokenizer = Finder(1), random_llama()[1]
    found = retrieval(model, tokenizer, range(1, 257), TEXT, 600)
    assert list(found) == list(RETRIEVAL) and found["copying"]["recall"] == 1.0
    assert {len(row) for row in model.seen if len(row) > 5} == {600}


def test_a_teacher_is_limited_by_its_positions_and_a_student_by_learned_ones():
    all_of_them = models()
    teacher = all_of_them.pop("llama")
    limits = {name: limits_of({"teacher": teacher, "student": student}) for name, student in all_of_them.items()}
    assert [one["teacher"] for one in limits.values()] == [2048] * 3
    assert {name: one["student"] for name, one in limits.items()} == {"ssd": None, "s6, positions": 40, "hybrid": None}


class TestHeldLength:
    LENGTHS = (256, 512, 1024, 2048)

    def found(self, teacher: list[float | None], student: list[float]) -> dict:
        rows = {
            str(length): {"teacher": theirs if theirs is None else {"recall": theirs}, "student": {"recall": ours}}
            for length, theirs, ours in zip(self.LENGTHS, teacher, student)
        }
        return {"copying": rows}

    def loss(self, *rises: float) -> dict:
        buckets = [{"from": 1, "to": 256}, {"from": 256, "to": 512}]
        for power, rise in enumerate(rises, start=9):
            buckets.append({"from": 2**power, "to": 2 ** (power + 1), "rise_ci95": [rise, rise + 0.2]})
        return {"buckets": [bucket | {"student": {"nll": 1.0}} for bucket in buckets]}

    def test_by_hand(self):
        found = self.found([1.0, 0.9, 0.5, 0.5], [0.95, 0.82, 0.44, 0.5])
        # At 1,024 it finds less than 0.45; that it finds more further on does not count.
        assert held_length(self.LENGTHS, found, self.loss(-0.1, 0.01)) == {"copying": 512, "loss": 1024, "all": 512}
        assert held_length(self.LENGTHS, found, self.loss(0.01, -0.1))["loss"] == 512

    def test_the_distance_to_the_teacher_counts_where_it_is_known(self):
        found, loss = self.found([1.0] * 4, [1.0] * 4), self.loss(0.01, -0.1)
        loss["buckets"][2]["difference_rise_ci95"] = [-0.01, 0.02]  # the text is harder there, for both
        assert held_length(self.LENGTHS, found, loss)["loss"] == 2048
        loss["buckets"][3]["difference_rise_ci95"] = [0.01, 0.02]  # it is easier, and the student gains less
        assert held_length(self.LENGTHS, found, loss)["loss"] == 1024

    def test_beyond_the_teachers_positions(self):
        loss = self.loss(-0.1, -0.1)
        assert held_length(self.LENGTHS, self.found([1.0, 0.6, None, None], [1, 1, 0.55, 0.53]), loss)["all"] == 1024
        assert held_length(self.LENGTHS, self.found([None] * 4, [1, 0.95, 0.85, 0.85]), loss)["copying"] == 512

    def test_where_the_teacher_finds_nothing_nothing_is_held(self):
        loss = self.loss(-0.1, -0.1)
        assert held_length(self.LENGTHS, self.found([0.5, 0.45, 0.02, 0.0], [0.5, 0.5, 0.5, 0.0]), loss)["all"] == 512
        assert held_length(self.LENGTHS, self.found([0.0, None, None, None], [0.0] * 4), loss)["copying"] == 0

    def test_what_was_not_measured_is_not_held(self):
        found = self.found([1.0] * 4, [1.0] * 4)
        assert held_length(self.LENGTHS, found, self.loss(-0.1)) == {"copying": 2048, "loss": 1024, "all": 1024}
        assert held_length(self.LENGTHS, self.found([1.0] * 4, [0.5] * 4), self.loss())["all"] == 0
        loss = self.loss(-0.1, -0.1)
        loss["buckets"][2]["student"] = None
        assert held_length(self.LENGTHS, found, loss)["loss"] == 512

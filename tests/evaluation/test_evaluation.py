"""Numbers of evaluation.py against naive restatements, on tiny random models and on models made to be right."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cab_hf.evaluation.generation import sample
from cab_hf.evaluation.language import compare, perplexity
from cab_hf.evaluation.metrics import perplexity_of_sums, ratio_interval, wilson_interval
from cab_hf.evaluation.recall import copying_recall
from cab_hf.evaluation.speed import throughput
from cab_hf.models import CABMambaConfig, CABMambaForCausalLM


VOCAB = 99


def llama(seed: int = 0, vocab_size: int = VOCAB) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return sharpened(LlamaForCausalLM(config))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    return sharpened(GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64)))


def student() -> CABMambaForCausalLM:
    torch.manual_seed(2)
    return sharpened(CABMambaForCausalLM(CABMambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)))


def sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """Larger weights, so that an error shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "A_log" not in name:
                parameter.mul_(5.0)
    return model.eval()


class Copier(PreTrainedModel):
    """Predicts what followed the last earlier occurrence of the current token, and token 0 where there is none."""

    config_class = LlamaConfig

    def __init__(self, shift: int = 0) -> None:
        super().__init__(LlamaConfig(vocab_size=VOCAB))
        self.shift = shift
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, VOCAB)
        for row, tokens in enumerate(input_ids.tolist()):
            for now, token in enumerate(tokens):
                before = [place for place in range(now) if tokens[place] == token]
                guess = (tokens[before[-1] + 1] + self.shift) % VOCAB if before else 0
                logits[row, now, guess] = 9.0
        return SimpleNamespace(logits=logits)


def rows_of(*lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(3, VOCAB, length).tolist() for length in lengths]


def naive_nll(model: PreTrainedModel, row: list[int]) -> float:
    """One document alone, in float64, one token after the other."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row])).logits[0].double()
    return -sum(math.log(logits[index].softmax(-1)[row[index + 1]]) for index in range(len(row) - 1))


def packed_rows() -> tuple[list[list[int]], Dataset]:
    """Three documents in one block, and one document in another."""
    rows = rows_of(5, 2, 4, 11)
    first = [*rows[0], *rows[1], *rows[2]]
    return rows, Dataset.from_dict(
        {
            "input_ids": [first, rows[3]],
            "labels": [[-100, *rows[0][1:], -100, *rows[1][1:], -100, *rows[2][1:]], [-100, *rows[3][1:]]],
            "seq_idx": [[0] * 5 + [1] * 2 + [2] * 4, [0] * 11],
            "position_ids": [[*range(5), *range(2), *range(4)], [*range(11)]],
        }
    )


class TestPerplexity:
    @pytest.mark.parametrize("make", [llama, gpt2, student])
    def test_batch_and_padding_do_not_matter(self, make):
        model, rows = make(), rows_of(9, 5, 13, 2, 7, 9)
        truth = sum(naive_nll(model, row) for row in rows)
        for batch_size in (1, 8):
            for side in ("left", "right"):
                report = perplexity(model, rows, batch_size, padding_side=side, progress=False)
                assert report["n_tokens"] == sum(map(len, rows)) - len(rows) and report["n_blocks"] == 6
                assert report["nll"] == pytest.approx(truth / report["n_tokens"], rel=1e-5)
                assert report["perplexity"] == pytest.approx(math.exp(report["nll"]))
                assert report["ci95"][0] < report["perplexity"] < report["ci95"][1]

    @pytest.mark.parametrize("make", [llama, gpt2, student])
    def test_packed_documents_stay_apart(self, make):
        model = make()
        rows, blocks = packed_rows()
        report = perplexity(model, blocks, progress=False)
        assert report["n_tokens"] == 18
        assert report["nll"] == pytest.approx(sum(naive_nll(model, row) for row in rows) / 18, rel=1e-5)
        streamed = perplexity(model, blocks.to_iterable_dataset(), batch_size=1, progress=False)
        assert streamed["nll"] == pytest.approx(report["nll"], rel=1e-5)

    def test_a_model_that_would_leak_is_refused(self):
        blocks = packed_rows()[1]
        config = Mamba2Config(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_heads=2, head_dim=32, state_size=8, n_groups=1
        )
        with pytest.raises(ValueError, match="Mamba2ForCausalLM keeps documents apart only by seq_idx.*pad_documents"):
            perplexity(Mamba2ForCausalLM(config), blocks, progress=False)
        with pytest.raises(ValueError, match="only by position_ids"):
            perplexity(llama(), blocks.remove_columns("position_ids"), progress=False)

    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised by peft itself
    def test_adapters_are_seen_through(self):
        model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=True))
        blocks = packed_rows()[1]
        assert perplexity(model, blocks, progress=False) == perplexity(llama(), blocks, progress=False)

    @pytest.mark.parametrize("max_tokens", [1, 8, 9, 17, 26])
    @pytest.mark.parametrize("kind", ["ids", "labels", "right", "left"])
    def test_max_tokens_are_the_tokens_counted(self, max_tokens, kind):
        """The first so many predicted ones, wherever in a row they end."""
        model, tokens = student(), rows_of(9, 9, 9, 9)
        mask = [[0] * 3 * (kind == "left") + [1] * 6 + [0] * 3 * (kind == "right")] * 4
        rows = {
            "ids": tokens,
            "labels": [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in tokens],
        }.get(kind) or [{"input_ids": row, "attention_mask": seen} for row, seen in zip(tokens, mask)]
        found = perplexity(model, rows, 3, max_tokens=max_tokens, padding_side=kind if "t" in kind[-2:] else "right",
                           progress=False)  # fmt: skip
        available = {"ids": 32, "labels": 28}.get(kind, 20)
        assert found["n_tokens"] == min(max_tokens, available)

    def test_the_progress_has_a_total(self, capsys):
        perplexity(student(), rows_of(9, 9, 9, 9), 1, max_tokens=20)
        assert "3/3" in capsys.readouterr().err

    def test_max_tokens_does_not_depend_on_the_batch(self):
        model, tokens = llama(), torch.tensor(rows_of(*[8] * 10))
        reports = [perplexity(model, tokens, size, max_tokens=20, progress=False) for size in (1, 4)]
        assert [report["n_tokens"] for report in reports] == [20, 20]
        assert reports[0]["nll"] == pytest.approx(reports[1]["nll"], rel=1e-5)

    def test_uniform_model(self):
        model = llama()
        torch.nn.init.zeros_(model.lm_head.weight)
        assert perplexity(model, rows_of(9, 9), progress=False)["perplexity"] == pytest.approx(VOCAB, rel=1e-5)

    def test_mode_comes_back_and_nothing_is_recorded(self):
        model = llama().train()
        model.model.norm.eval()
        perplexity(model, rows_of(5), progress=False)
        assert model.training and model.model.layers[0].training and not model.model.norm.training
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_nothing_to_predict(self):
        with pytest.raises(ValueError, match="no token to predict"):
            perplexity(llama(), [[5], [6]], progress=False)

    def test_metric_needs_only_sums(self):
        report = perplexity_of_sums([2.0, 6.0, 0.0], [1, 3, 0])
        assert report == {
            "perplexity": math.exp(2.0),
            "ci95": [math.exp(2.0)] * 2,
            "nll": 2.0,
            "n_tokens": 4,
            "n_blocks": 2,
        }
        assert perplexity_of_sums([1e6, 1e6], [1, 1])["perplexity"] == math.inf


class TestCompare:
    def test_against_a_dense_restatement(self):
        ours, theirs = student(), llama()
        rows, blocks = packed_rows()
        report = compare(ours, theirs, blocks, batch_size=1, progress=False)
        kl = agreement = n = 0
        for row in rows:
            with torch.no_grad():
                p = theirs(input_ids=torch.tensor([row])).logits[0, :-1].double().softmax(-1)
                q = ours(input_ids=torch.tensor([row])).logits[0, :-1].double().softmax(-1)
            kl += (p * (p / q).log()).sum().item()
            agreement += (p.argmax(-1) == q.argmax(-1)).sum().item()
            n += len(row) - 1
        assert report["n_tokens"] == n == 18 and report["n_blocks"] == 2
        assert report["kl"] == pytest.approx(kl / n, rel=1e-5)
        assert report["agreement"] == pytest.approx(agreement / n)
        for name, model in (("student", ours), ("teacher", theirs)):
            alone = perplexity(model, blocks, progress=False)
            assert report[f"{name}_perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)
            assert report[f"{name}_perplexity_ci95"] == pytest.approx(alone["ci95"], rel=1e-4)
        ratio = report["student_perplexity"] / report["teacher_perplexity"]
        assert report["perplexity_ratio"] == pytest.approx(ratio)
        low, high = report["perplexity_ratio_ci95"]
        assert low < ratio < high
        low, high = report["agreement_ci95"]
        assert 0.0 <= low <= report["agreement"] <= high <= 1.0

    def test_a_model_with_itself(self):
        report = compare(llama(), llama(), rows_of(9, 5, 7), progress=False)
        assert report["kl"] == pytest.approx(0.0, abs=1e-6) and report["agreement"] == 1.0
        assert report["perplexity_ratio"] == 1.0 and report["perplexity_ratio_ci95"] == [1.0, 1.0]

    def test_padded_vocabulary(self):
        wide = llama(vocab_size=128)
        narrow = llama(vocab_size=VOCAB)
        narrow.load_state_dict(
            {
                name: tensor[:VOCAB] if tensor.shape[:1] == (128,) else tensor
                for name, tensor in wide.state_dict().items()
            }
        )
        report = compare(narrow, wide, rows_of(9, 5), progress=False)
        assert report["kl"] == pytest.approx(0.0, abs=1e-6) and report["agreement"] == 1.0
        with pytest.raises(ValueError, match="5000"):
            compare(narrow, llama(vocab_size=5000), rows_of(9), progress=False)


class TestCopyingRecall:
    @pytest.mark.parametrize("gap", [0, 1, 17])
    def test_a_copier_is_perfect(self, gap):
        report = copying_recall(Copier(), VOCAB, gap, length=12, n=3, progress=False)
        assert report["recall"] == 1.0 and report["n_tokens"] == 33 and report["n_sequences"] == 3
        assert report["ci95"][0] == pytest.approx(wilson_interval(1.0, 3)[0]) and report["ci95"][1] == 1.0

    def test_a_wrong_copier_has_none(self):
        report = copying_recall(Copier(shift=1), range(10, 60), 5, length=12, n=3, progress=False)
        assert report["recall"] == 0.0 and report["ci95"][0] == 0.0 < report["ci95"][1] < 1.0

    def test_only_tokens_of_the_pool(self):
        seen = []

        class Watching(Copier):
            def forward(self, input_ids, use_cache=False):
                seen.append(input_ids)
                return super().forward(input_ids, use_cache)

        copying_recall(Watching(), range(40, 70), 6, length=8, n=4, batch_size=3, progress=False)
        tokens = torch.cat([ids for ids in seen if ids.shape[1] == 22])  # without those that ask whether it is causal
        assert tokens.shape == (4, 22) and tokens.min() >= 40 and tokens.max() < 70
        assert torch.equal(tokens[:, :8], tokens[:, -8:])
        assert all(len(set(row[:8])) == 8 and not set(row[:8]) & set(row[8:14]) for row in tokens.tolist())

    def test_errors(self):
        with pytest.raises(ValueError, match="9 tokens, fewer than the 11"):
            copying_recall(Copier(), 9, 1, length=10, progress=False)


class TestIntervals:
    def test_wilson_against_published_values(self):
        # Newcombe 1998, table I, method 3.
        assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
        assert wilson_interval(0 / 20, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)

    def test_ratio_interval_is_the_usual_one_for_equal_rows(self):
        sums = np.random.default_rng(0).normal(30.0, 4.0, 50)
        means = sums / 10
        error = 1.96 * means.std(ddof=1) / math.sqrt(50)
        expected = (means.mean(), means.mean() - error, means.mean() + error)
        assert ratio_interval(sums, [10] * 50) == pytest.approx(expected, rel=1e-4)

    def test_ratio_interval_covers(self):
        generator = np.random.default_rng(1)
        hits = 0
        for _ in range(400):
            counts = generator.integers(5, 50, 40)
            low, high = ratio_interval(2.0 * counts + generator.normal(0, 1, 40) * counts, counts)[1:]
            hits += low < 2.0 < high
        assert 0.90 < hits / 400 < 0.98

    def test_one_row_says_nothing_about_spread(self):
        assert ratio_interval([6.0], [3]) == (2.0, -math.inf, math.inf)


class TestThroughputAndSample:
    @pytest.mark.parametrize("mode", ["forward", "generate"])
    def test_report(self, mode):
        report = throughput(llama(), 6, 2, mode, new_tokens=3, repeats=2, warmup=1)
        assert 0 < report["slowest"] <= report["tokens_per_second"] <= report["fastest"]
        assert (report["device"], report["dtype"], report["length"]) == ("cpu", "float32", 6)
        assert report["new_tokens"] == (3 if mode == "generate" else 0)

    def test_unknown_mode(self):
        with pytest.raises(ValueError, match="mode is 'backward'"):
            throughput(llama(), 6, 2, "backward")

    def test_sample(self):
        words = [f"w{index}" for index in range(VOCAB)]
        backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", eos_token="w1")
        model = llama()
        state = torch.random.get_rng_state()
        texts = [sample(model, tokenizer, "w5", 12, seed=seed, temperature=3.0) for seed in (0, 0, 1)]
        assert texts[0] == texts[1] != texts[2]
        assert torch.equal(torch.random.get_rng_state(), state)
        model.generation_config.update(repetition_penalty=1e6, top_k=1)  # of its own, not of its distribution
        assert sample(model, tokenizer, "w5", 12, seed=0, temperature=3.0) == texts[0]
        assert model.generation_config.top_k == 1
        assert sample(torch.compile(model, backend="eager"), tokenizer, "w5", 12, seed=0, temperature=3.0) == texts[0]
        greedy = sample(model, tokenizer, "w5", 1, temperature=0.0)
        with torch.no_grad():
            assert greedy == words[model(torch.tensor([[5]])).logits[0, -1].argmax()]

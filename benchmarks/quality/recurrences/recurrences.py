"""Another recurrence in the same student: the gated delta rule beside the SSD scan, trained by KL alone.

    python benchmarks/data/prepare_text.py --only speeches brown
    python benchmarks/quality/small_lm/teacher.py --steps 450
    python benchmarks/quality/recurrences/recurrences.py        # what is finished stays; an hour on a core

Two settings: the toy of `../recall/toy.py` (random tokens in which spans come again, a teacher that copies) and the
small Llama of `../small_lm` (speeches). In each, a student has its teacher's weights and one of two mixers. They share
projections, convolution, gate, norm, fit and width of the state, and differ in the recurrence:

    SSD:               S <- exp(g) S + dt k v^T
    gated delta rule:  S <- exp(g) S + beta k (v - exp(g) S^T k)^T,  k and q of length one

The delta rule is transformers' own (`torch_chunk_gated_delta_rule` of Qwen3-Next). Of three or four learning rates,
and two starts of the delta rule, each mixer gets what ends with the lowest training KL with seed 0. It is then trained
with seed 1 too, and once more with four or five times as many tokens. A control is the SSD mixer, at the same rate,
with k and q of length one.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel, set_seed
from transformers.models.qwen3_next.modeling_qwen3_next import l2norm, torch_chunk_gated_delta_rule

from cab_hf import (
    CABMambaForCausalLM,
    DistillationTrainer,
    DistillationTrainingArguments,
    fit_output_projection,
    student_from_teacher,
)
from cab_hf.data.documents import load_documents
from cab_hf.data.packing import LanguageCollator, pack_documents
from cab_hf.evaluation.language import compare
from cab_hf.models.mixers import SSDMixer, inverse_softplus
from cab_hf.transfer import calibrate_output_norm


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "recall"))

import toy  # noqa: E402


RESULTS = HERE / "recurrences_cpu.json"
SMALL_LM = Path("outputs/small_lm")
TEXTS = {"speeches": "speeches", "brown (out of domain)": "brown"}
CALIBRATION_TOKENS, HELD_OUT_TOKENS = 4096, 16384
COMMON = {"lr_scheduler_type": "cosine", "weight_decay": 0.01, "bridge_weight": 0.0, "kl_weight": 1.0}
COMMON |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "dataloader_drop_last": True}
TIMED = 12
SEEDS = (0, 1)

SLOW = 4096
"""Memory, in tokens, with which a gated delta rule's decays start."""

STARTS = ("averaging", "half")
"""Of a gated delta rule's beta: one over the memory of the SSD head in its place, or one half. Of keys that are alike
the first writes the SSD head's moving average."""


class GatedDeltaMixer(SSDMixer):
    """An SSD mixer whose scan is the gated delta rule.

    x, B and C of the convolution are values, keys and queries, the last two scaled to length one. The time step and A
    give the decay alone; how much of a value is written says `beta_proj`, at first the same for every token.
    """

    def __init__(self, mixer: SSDMixer, start: str):
        """Of an SSD mixer with its weights, one group a head.

        Args:
            mixer: whose weights are copied.
            start: one of `STARTS`.
        """
        super().__init__(mixer.config, mixer.layer_idx)
        self.load_state_dict(mixer.state_dict())
        self.beta_proj = nn.Linear(mixer.config.hidden_size, mixer.config.num_heads)
        nn.init.zeros_(self.beta_proj.weight)
        steps = nn.functional.softplus(self.dt_bias.detach())  # (h,), one over a head's memory in tokens
        with torch.no_grad():
            self.beta_proj.bias.copy_(steps.logit() if start == "averaging" else torch.zeros_like(steps))
            self.dt_bias.copy_(inverse_softplus(torch.full_like(steps, 1 / SLOW)))

    def stream_and_gate(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As an SSD mixer's; the stream `(b, t, d + 2 * h * n + 2 * h)` has the logits of beta behind it."""
        stream, gate = super().stream_and_gate(hidden_states)
        return torch.cat((stream, self.beta_proj(hidden_states)), dim=-1), gate

    def scan(
        self,
        stream: torch.Tensor,
        cache: None = None,
        attention_mask: None = None,
        seq_idx: None = None,
        output_projections: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """As an SSD mixer's, of whole rows.

        Raises:
            ValueError: for a cache, padding and packed documents.
        """
        if any(one is not None for one in (cache, attention_mask, seq_idx)):
            raise ValueError("cache, attention_mask or seq_idx is given, but this mixer reads whole rows: use none.")
        config = self.config
        width, heads = config.mixer_width, config.num_heads
        xBC, dt, beta = stream.split([width + 2 * self.state_width, heads, heads], dim=-1)
        dt = nn.functional.softplus(dt.float() + self.dt_bias.float())  # (b, t, h)
        xBC = self.convolve(xBC, None, None, None)
        x, B, C = xBC.split([width, self.state_width, self.state_width], dim=-1)
        x = x.unflatten(-1, (heads, config.head_dim))  # (b, t, h, p)
        B, C = (one.unflatten(-1, (heads, config.state_size)) for one in (B, C))  # (b, t, h, n)
        decay = -torch.exp(self.A_log.float()) * dt
        y, _ = torch_chunk_gated_delta_rule(
            C, B, x, decay, beta.sigmoid(), chunk_size=config.chunk_size, use_qk_l2norm_in_kernel=True
        )
        y = y + self.D[:, None] * x
        return y.flatten(-2), B, C, dt


class UnitLengthMixer(SSDMixer):
    """An SSD mixer whose B and C are scaled to length one, as the delta rule's keys and queries are."""

    def __init__(self, mixer: SSDMixer):
        """Of an SSD mixer with its weights."""
        super().__init__(mixer.config, mixer.layer_idx)
        self.load_state_dict(mixer.state_dict())

    def convolve(self, x: torch.Tensor, *where: Any) -> torch.Tensor:
        x, BC = super().convolve(x, *where).split([self.config.mixer_width, 2 * self.state_width], dim=-1)
        return torch.cat((x, l2norm(BC.unflatten(-1, (-1, self.config.state_size))).flatten(-2)), dim=-1)


class Setting(NamedTuple):
    """A teacher and the text on which its students are trained and measured.

    Attributes:
        teacher: in eval mode.
        blocks: rows of the training.
        measure: what a trained student is worth.
        rates: learning rates to choose from.
        steps: of each run, and of one more with the best rate.
        batch_size: rows a step.
        warmup: share of the steps.
    """

    teacher: PreTrainedModel
    blocks: Dataset
    measure: Callable[[PreTrainedModel], dict[str, Any]]
    rates: Sequence[float]
    steps: tuple[int, int]
    batch_size: int
    warmup: float


def toy_setting() -> Setting:
    teacher = toy.make_teacher(toy.COMMON["max_steps"]).eval()

    def measure(student: PreTrainedModel) -> dict[str, Any]:
        return {f"gap {gap}": recall for gap, recall in toy.recall(student).items()}

    return Setting(teacher, toy.rows(True, 1), measure, (1.5e-3, 3e-3, 6e-3), (300, 1500), toy.BATCH, 1 / 15)


def small_lm_setting() -> Setting:
    teacher = LlamaForCausalLM.from_pretrained(SMALL_LM / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(SMALL_LM / "teacher")

    def pack(name: str) -> Dataset:
        documents = load_documents(str(SMALL_LM / f"tokens/{name}.npz"))
        return pack_documents(documents, tokenizer, 256, isolate_documents=False)

    held_out = {title: pack(f"{name}.heldout") for title, name in TEXTS.items()}

    def measure(student: PreTrainedModel) -> dict[str, Any]:
        found = {}
        for title, blocks in held_out.items():
            one = compare(student, teacher, blocks, max_tokens=HELD_OUT_TOKENS, progress=False)
            found[f"{title}: KL"], found[f"{title}: ppl ratio"] = one["kl"], one["perplexity_ratio"]
        return found

    return Setting(teacher, pack("speeches.train"), measure, (1e-3, 2e-3, 4e-3, 8e-3), (125, 500), 16, 1 / 10)


SETTINGS = {"toy": toy_setting, "small_lm": small_lm_setting}
SSD, DELTA = MIXERS = ("SSD", "gated delta rule")
CONTROL = "SSD, unit length"


def make_student(setting: Setting, mixer: str, start: str | None) -> CABMambaForCausalLM:
    """A student of the setting's teacher with copied and fitted weights; `start` is that of a delta rule."""
    student = student_from_teacher(setting.teacher, data=(), use_cache=False)
    for layer in student.backbone.layers:
        if mixer == DELTA:
            layer.mixer = GatedDeltaMixer(layer.mixer, start)
        elif mixer == CONTROL:
            layer.mixer = UnitLengthMixer(layer.mixer)
    length = len(setting.blocks[0]["input_ids"])
    rows = torch.tensor(setting.blocks[: CALIBRATION_TOKENS // length]["input_ids"])
    batches = [{"input_ids": part} for part in rows.chunk(4)]
    calibrate_output_norm(student, setting.teacher, batches[0])
    fit_output_projection(student, setting.teacher, batches)
    return student


def distil(setting: Setting, mixer: str, start: str | None, rate: float, seed: int, steps: int) -> dict[str, Any]:
    set_seed(seed)
    student = make_student(setting, mixer, start)
    started = time.time()
    options = {"max_steps": steps, "warmup_steps": round(setting.warmup * steps), "logging_steps": steps // 10}
    options |= {"learning_rate": rate, "seed": seed, "per_device_train_batch_size": setting.batch_size}
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationTrainingArguments(output_dir=folder, **COMMON | options)
        trainer = DistillationTrainer(
            student, setting.teacher, args, train_dataset=setting.blocks, data_collator=LanguageCollator(0)
        )
        trainer.train()
    seconds = time.time() - started
    log = [round(entry["kl"], 4) for entry in trainer.state.log_history if "kl" in entry]
    return {"after": setting.measure(student), "training_kl": log, "seconds": round(seconds)}


def time_steps(setting: Setting) -> dict[str, float]:
    """The shortest of some training steps of each mixer, in ms of one core: the student alone, forward and backward.

    The mixers take turns, so that other work on the machine meets both.
    """
    students = {mixer: make_student(setting, mixer, "half").train() for mixer in MIXERS}
    ids = torch.tensor(setting.blocks[: setting.batch_size]["input_ids"])
    found: dict[str, list[float]] = {mixer: [] for mixer in MIXERS}
    for _ in range(TIMED + 1):
        for mixer, student in students.items():
            student.zero_grad()
            started = time.process_time()
            student(input_ids=ids, labels=ids).loss.backward()
            found[mixer].append(1e3 * (time.process_time() - started))
    return {mixer: round(min(times[1:]), 1) for mixer, times in found.items()}


def run(setting: Setting, part: dict[str, Any], save: Callable[[], None]) -> None:
    """Fills a setting's part of the report; what stands there stays."""
    steps, more_steps = setting.steps

    def result(mixer: str, start: str | None, rate: float, seed: int, steps: int = steps) -> dict[str, Any]:
        key = f"{'' if start is None else f'{start}, '}{rate:g}, {steps} steps, seed {seed}"
        done = part.setdefault("runs", {}).setdefault(mixer, {})
        if key not in done:
            done[key] = distil(setting, mixer, start, rate, seed, steps)
            save()
            print(f"{mixer}, {key}: {done[key]}", flush=True)
        return done[key]

    if "step_ms" not in part:
        students = {mixer: make_student(setting, mixer, "half") for mixer in MIXERS}
        config = students[SSD].config
        part |= {"steps": steps, "batch_size": setting.batch_size}
        part["state"] = [config.num_heads, config.state_size, config.head_dim]
        part["parameters"] = {mixer: student.num_parameters() for mixer, student in students.items()}
        part["teacher"] = setting.measure(setting.teacher)
        part["step_ms"] = time_steps(setting)
        save()
    chosen = part.setdefault("chosen", {})
    for mixer in MIXERS:

        def worth(start: str | None, rate: float, mixer: str = mixer) -> float:
            return result(mixer, start, rate, 0)["training_kl"][-1]

        start = None
        if mixer == DELTA:
            start = min(STARTS, key=lambda one: worth(one, setting.rates[1]))
        rate = min(setting.rates, key=lambda rate: worth(start, rate))
        chosen[mixer] = {"start": start, "rate": rate}
        save()
    chosen[CONTROL] = chosen[SSD]
    for mixer in (*MIXERS, CONTROL):
        found = [result(mixer, **chosen[mixer], seed=seed) for seed in SEEDS]
        means = {name: sum(one["after"][name] for one in found) / len(found) for name in found[0]["after"]}
        part.setdefault("means", {})[mixer] = means
        after = result(mixer, **chosen[mixer], seed=SEEDS[0], steps=more_steps)["after"]
        part.setdefault("longer", {})[mixer] = {"steps": more_steps} | after
        save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.settings:
        # Settings may run side by side, so each writes its own part alone.
        stored = json.loads(options.output.read_text()) if options.output.is_file() else {}
        part = stored.get(name, {})

        def save(name: str = name, part: dict[str, Any] = part) -> None:
            report = json.loads(options.output.read_text()) if options.output.is_file() else {}
            report["versions"] = {one: version(one) for one in ("torch", "transformers", "accelerate", "datasets")}
            report["hardware"] = f"{platform.machine()} CPU, one thread"
            report[name] = part
            options.output.write_text(json.dumps(report, indent=1) + "\n")

        run(SETTINGS[name](), part, save)
        save()


if __name__ == "__main__":
    main()

"""Open questions about starts and rates, at a CPU's size: one change at a time beside the default start, by KL alone.

    python benchmarks/data/prepare_text.py --only speeches brown
    python benchmarks/quality/small_lm/teacher.py --steps 450
    python benchmarks/quality/questions/questions.py        # what is finished stays; an hour on a quiet core

Settings, tokens and fit are those of `../recurrences`: the small Llama of `../small_lm` (125 steps, 0.5M tokens) and
the toy of `../recall/toy.py` (300 steps, 1.2M tokens). A student has its teacher's weights, copied and fitted. It is
the default one but for one thing:

    decays        memories as long as the teacher's heads look back on average, in place of log-spaced ones
    fitted        each head's memory is the one by which it explains its teacher's head best
    norm          an RMS norm with a learned scale on each head's B and C, behind the convolution
    rotary        states that turn as the teacher's keys and queries do with their position (`keep_rotary`)
    frozen taps   the convolution stays the identity
    random taps   the convolution starts as usual in PyTorch; there is still no SiLU behind it
    tenth, third  what is no mixer learns at a tenth or a third of the mixers' rate
    half batches, quarter batches   as many tokens in twice or four times as many steps, at rates over the square root
    long          memories of 32 to 4,096 tokens, in place of 8 to 512

A kind of several names, as "rotary, decays", has each of these changes: which of them add up with turning states?
Of two learning rates each kind gets what ends with the lower training KL with seed 0, and is trained with seed 1 too.
The toy answers the first three alone. Rotary's recorded runs are of a prototype that rotated B and C by their place,
equal to `keep_rotary` up to rounding. Seeds decide the order of the rows and what is random in a start.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from cab_hf import (
    CABMambaForCausalLM,
    DistillationTrainer,
    DistillationTrainingArguments,
    fit_output_projection,
    student_from_teacher,
)
from cab_hf.data.packing import LanguageCollator
from cab_hf.models.mixers import SSDMixer, inverse_softplus
from cab_hf.transfer import calibrate_output_norm
from cab_hf.transfer.memories import fit_memories


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "recurrences"))

import recurrences  # noqa: E402


RESULTS = HERE / "questions_cpu.json"
RATES = {"small_lm": (4e-3, 8e-3), "toy": (3e-3, 6e-3)}
DEFAULT = "default"
TWO_RATES = {"tenth": 1 / 10, "third": 1 / 3}
SMALLER_BATCHES = {"half batches": 2, "quarter batches": 4}
FIRST_KINDS = (DEFAULT, "decays", "norm", "rotary")
COMBINED_KINDS = (
    "rotary, decays",
    "rotary, tenth",
    "rotary, decays, tenth",
    "rotary, long",
    "fitted",
    "fitted, tenth",
    "rotary, fitted",
    "rotary, fitted, tenth",
    "fitted, half batches",
    "fitted, quarter batches",
    "rotary, fitted, tenth, quarter batches",
)
KINDS = {
    "small_lm": (*FIRST_KINDS, "frozen taps", "random taps", *TWO_RATES, "fitted", *COMBINED_KINDS),
    "toy": FIRST_KINDS,
}
OF_TRAINING = {"frozen taps", *TWO_RATES, *SMALLER_BATCHES}  # these change nothing of a start
FIELDS = {"rotary": {"keep_rotary": True}, "random taps": {"conv_init": "usual"}, "long": {"memory_range": (32, 4096)}}
SEEDS = (0, 1)


class ChangedMixer(SSDMixer):
    """An SSD mixer that changes its B and C between convolution and scan, in whole rows."""

    def __init__(self, mixer: SSDMixer):
        """Of an SSD mixer with its weights, one group a head."""
        super().__init__(mixer.config, mixer.layer_idx)
        self.load_state_dict(mixer.state_dict())

    def convolve(self, x: torch.Tensor, *where: Any) -> torch.Tensor:
        config = self.config
        x, BC = super().convolve(x, *where).split([config.mixer_width, 2 * self.state_width], dim=-1)
        return torch.cat((x, self.change(BC.unflatten(-1, (-1, config.state_size))).flatten(-2)), dim=-1)

    def change(self, BC: torch.Tensor) -> torch.Tensor:
        """B's heads, then C's, `(b, t, 2 * h, n)`, and shaped alike what the scan reads."""
        raise NotImplementedError


class NormMixer(ChangedMixer):
    """With an RMS norm over the state of each head's B and C, whose scales start at one."""

    def __init__(self, mixer: SSDMixer):
        super().__init__(mixer)
        config = mixer.config
        self.BC_norm = nn.ParameterDict({"weight": nn.Parameter(torch.ones(2 * config.num_heads, config.state_size))})

    def change(self, BC: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(BC, BC.shape[-1:], eps=self.config.layer_norm_epsilon) * self.BC_norm["weight"]


@torch.no_grad()
def mean_distances(setting: recurrences.Setting, rows: torch.Tensor) -> torch.Tensor:
    """How many tokens back each head of the teacher looks, `(layers, h)`: the mean over all tokens of `rows`."""
    teacher, before = setting.teacher, setting.teacher.config._attn_implementation
    teacher.set_attn_implementation("eager")
    maps = teacher(rows, output_attentions=True).attentions  # (b, h, t, t) each
    teacher.set_attn_implementation(before)
    places = torch.arange(rows.shape[1])
    back = (places[:, None] - places).clamp(min=0)  # (t, t)
    return torch.stack([(one * back).sum(-1).mean((0, 2)) for one in maps])


def calibration_rows(setting: recurrences.Setting) -> torch.Tensor:
    length = len(setting.blocks[0]["input_ids"])
    return torch.tensor(setting.blocks[: recurrences.CALIBRATION_TOKENS // length]["input_ids"])


def make_student(setting: recurrences.Setting, kind: str) -> CABMambaForCausalLM:
    """A student of the setting's teacher with copied and fitted weights, default but for what `kind` changes."""
    changes = kind.split(", ")
    fields = {name: value for one in changes for name, value in FIELDS.get(one, {}).items()}
    student = student_from_teacher(setting.teacher, data=(), use_cache=False, **fields)
    rows = calibration_rows(setting)
    distances = mean_distances(setting, rows)
    for layer, heads in zip(student.backbone.layers, distances, strict=True):
        if "decays" in changes:
            # The weights exp(-distance / memory) have a mean distance of about the memory.
            layer.mixer.dt_bias.data.copy_(inverse_softplus(1 / heads.clamp(min=1.0)))
        if "norm" in changes:
            layer.mixer = NormMixer(layer.mixer)
        if "frozen taps" in changes:
            layer.mixer.conv1d.requires_grad_(False)
    batches = [{"input_ids": part} for part in rows.chunk(4)]
    if "fitted" in changes:
        fit_memories(student, setting.teacher, {"input_ids": rows})
    calibrate_output_norm(student, setting.teacher, batches[0])
    fit_output_projection(student, setting.teacher, batches)
    return student


def distil(setting: recurrences.Setting, kind: str, rate: float, seed: int) -> dict[str, Any]:
    set_seed(seed)
    student = make_student(setting, kind)
    (parts,) = [SMALLER_BATCHES[one] for one in kind.split(", ") if one in SMALLER_BATCHES] or [1]
    steps, started = parts * setting.steps[0], time.time()
    options = {"max_steps": steps, "warmup_steps": round(setting.warmup * steps), "logging_steps": steps // 10}
    rate /= parts**0.5
    options |= {"learning_rate": rate, "seed": seed, "per_device_train_batch_size": setting.batch_size // parts}
    for one in TWO_RATES.keys() & set(kind.split(", ")):
        options |= {"learning_rate": TWO_RATES[one] * rate, "mixer_learning_rate": rate}
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationTrainingArguments(output_dir=folder, **recurrences.COMMON | options)
        texts = {"train_dataset": setting.blocks, "data_collator": LanguageCollator(0)}
        trainer = DistillationTrainer(student, setting.teacher, args, **texts)
        trainer.train()
    seconds = time.time() - started
    log = [round(entry["kl"], 4) for entry in trainer.state.log_history if "kl" in entry]
    return {"after": setting.measure(student), "training_kl": log, "seconds": round(seconds)}


def run(name: str, setting: recurrences.Setting, part: dict[str, Any], save: Callable[[], None]) -> None:
    """Fills a setting's part of the report; what stands there stays. All rates come before all other seeds."""
    runs, chosen, means = (part.setdefault(key, {}) for key in ("runs", "chosen", "means"))
    before = part.setdefault("before", {})
    part |= {"steps": setting.steps[0], "batch_size": setting.batch_size, "rates": RATES[name]}
    part["distances"] = mean_distances(setting, calibration_rows(setting)).tolist()

    def result(kind: str, rate: float, seed: int) -> dict[str, Any]:
        key, done = f"{rate:g}, seed {seed}", runs.setdefault(kind, {})
        if key not in done:
            done[key] = distil(setting, kind, rate, seed)
            save()
            print(f"{name}, {kind}, {key}: {done[key]}", flush=True)
        return done[key]

    for kind in KINDS[name]:
        if kind not in before and OF_TRAINING.isdisjoint(kind.split(", ")):
            set_seed(SEEDS[0])
            before[kind] = setting.measure(make_student(setting, kind))
        found = {rate: result(kind, rate, SEEDS[0])["training_kl"][-1] for rate in RATES[name]}
        chosen[kind] = min(found, key=found.get)
        save()
    for kind in KINDS[name]:
        found = [result(kind, chosen[kind], seed)["after"] for seed in SEEDS]
        means[kind] = {title: sum(one[title] for one in found) / len(found) for title in found[0]}
        save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = json.loads(options.output.read_text()) if options.output.is_file() else {}
    report["versions"] = {one: version(one) for one in ("torch", "transformers", "accelerate", "datasets")}
    report["hardware"] = f"{platform.machine()} CPU, one thread"
    for name in options.settings:
        run(
            name,
            recurrences.SETTINGS[name](),
            report.setdefault(name, {}),
            lambda: options.output.write_text(json.dumps(report, indent=1) + "\n"),
        )


if __name__ == "__main__":
    main()

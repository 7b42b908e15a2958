"""Which families of transformers can teach, and which become students: each check beside the teacher's own result.

Every family runs in a process of its own, with a limit of memory and time: some are large even when they are tiny.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from cab_hf.evaluation.tiny_families import CAUSAL_FAMILIES, tiny_model, tiny_tokens
from cab_hf.inference import evaluating
from cab_hf.models import CABHybridForCausalLM
from cab_hf.teachers.teacher import Teacher
from cab_hf.transfer.hybrid import hybrid_from_teacher
from cab_hf.transfer.reading import exactness, read_attention


CHECKS = ("forward", "gradients", "cache", "half", "left_padding", "saved", "remote")
NEW_TOKENS = 8
_MEMORY, _SECONDS = 9 << 30, 400
Row = dict[str, Any]


def cover(families: Sequence[str] = (), output: str | Path | None = None) -> list[Row]:
    """Checks families, each in a process of its own, and writes a page and its numbers.

    Args:
        families: model types; all causal ones of the installed transformers if none.
        output: page to write (`coverage.md`); the numbers go beside it (`coverage.json`). None writes nothing.

    Returns:
        One row a family, as [`check_family`].
    """
    rows = []
    for family in families or CAUSAL_FAMILIES:
        rows.append(_apart(family))
        print(f"{family}: {_verdict(rows[-1])}", flush=True)
    if output is not None:
        path = Path(output)
        path.write_text(page(rows), encoding="utf-8")
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        numbers = json.dumps({"versions": versions, "families": rows}, indent=1)
        path.with_suffix(".json").write_text(numbers + "\n", encoding="utf-8")
    return rows


def check_family(family: str) -> Row:
    """What a tiny model of a family can do.

    Returns:
        `family`, and, each with True, or the reason why not:
        `built`: a tiny model runs. `captured`: a `Teacher` hands out attention, with equal logits.
        `read`: the largest relative error of what was read, or why it was not. `decoder`: whether it needed
        `is_decoder=True`.
        Of the student: `forward` (finite, of the teacher's shape), `gradients` (every parameter of its mixers has
        one), `cache` (generation with cache is that without), `half` (the same with every second attention kept),
        `left_padding` (generation is that of unpadded rows, whole and half replaced), `saved` (a folder loads with
        equal logits, but for rounding), `remote` (the same by `trust_remote_code`).
        `teacher_cache`, `teacher_left_padding`: the same of the teacher.
    """
    row: Row = {"family": family}
    tokens = tiny_tokens()
    row["built"] = _noted(lambda: _built(family, tokens, row))
    if row["built"] is not True:
        return row
    teacher = row.pop("model")
    row["captured"] = _noted(lambda: _captured(teacher, tokens))
    teacher = tiny_model(family, **({"is_decoder": True} if row["decoder"] else {}))
    whole = _noted(lambda: _students(teacher, row))
    if not isinstance(whole, list):
        row["read"] = whole
        return row
    student, half = whole
    row["forward"] = _noted(lambda: _forward(teacher, student, tokens))
    row["gradients"] = _noted(lambda: _gradients(student, tokens))
    row["cache"] = _noted(lambda: _cache(student, tokens))
    row["half"] = _noted(lambda: half is None or _cache(half, tokens))
    row["left_padding"] = _noted(lambda: all(_left_padding(one, tokens) for one in (student, half) if one is not None))
    row["teacher_cache"] = _noted(lambda: _cache(teacher, tokens))
    row["teacher_left_padding"] = _noted(lambda: _left_padding(teacher, tokens))
    row["saved"] = _noted(lambda: _reloaded(student, tokens, remote=False))
    row["remote"] = _noted(lambda: _reloaded(student, tokens, remote=True))
    return row


def passes(row: Row) -> bool:
    """Whether a family's student passes every check that its teacher passes itself."""
    return not missed(row)


def missed(row: Row) -> list[str]:
    """The checks that a family's student misses and its teacher does not."""
    if row.get("built") is not True:
        return ["built"]
    if not isinstance(row.get("read"), float):
        return ["read"]
    own = {"cache": "teacher_cache", "half": "teacher_cache", "left_padding": "teacher_left_padding"}
    return [name for name in CHECKS if row[name] is not True and row.get(own.get(name, ""), True) is True]


def page(rows: Sequence[Row]) -> str:
    """The page of the documentation."""
    built = [row for row in rows if row["built"] is True]
    captured = sum(row["captured"] is True for row in built)
    whole = [row for row in rows if passes(row)]
    exact = sum(row["read"] <= row["exactness"] for row in whole)
    lines = [
        "# Which Transformers become students",
        "",
        f"Every causal family of transformers {transformers.__version__}, as a tiny random model, checked by "
        "`cab-hf coverage`. The checks say that a student runs and starts from what its teacher computes; how good it "
        "gets, training says.",
        "",
        f"Of {len(rows)} families {len(built)} can be built tiny. {captured} of them hand out their attention to a "
        f"bridge. {len(whole)} become students that pass every check that their teacher passes itself; of {exact} of "
        f"these all projections were read exactly, of {len(whole) - exact} not (`accept_inexact`).",
        "",
        "| family | attention shown | largest reading error | student | what is missed, and why |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        read = row.get("read")
        error = "-" if not isinstance(read, float) else "exact" if read <= row["exactness"] else f"{read:.1%}"
        shown = "-" if row["built"] is not True else "yes" if row["captured"] is True else "no"
        notes = [f"{name}: {_reason(row[name])}" for name in missed(row) if name in row]
        if row.get("captured") not in (None, True):
            notes.append(f"attention: {_reason(row['captured'])}")
        if row.get("decoder"):
            notes.append("with `is_decoder=True`")
        if row.get("kept"):
            notes.append(f"{row['kept']} attention modules stay")
        lines.append(
            f"| {row['family']} | {shown} | {error} | {'yes' if passes(row) else 'no'} | {'; '.join(notes) or '-'} |"
        )
    return "\n".join(lines) + "\n"


def _verdict(row: Row) -> str:
    lacking = missed(row)
    return "passes" if not lacking else f"misses {', '.join(f'{n} ({_reason(row.get(n))})' for n in lacking)}"


def _reason(found: Any) -> str:
    return "differs" if found is False else str(found).replace("|", "/").replace("\n", " ")[:160]


def _noted(check: Callable[[], Any]) -> Any:
    """A check's result, or what it raised: a stranger's code may raise anything."""
    try:
        return check()
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


@torch.no_grad()
def _built(family: str, tokens: Tensor, row: Row) -> bool:
    model = tiny_model(family)
    logits = model(tokens).logits
    changed = model(torch.cat((tokens[:, :1], (tokens[:, 1:] + 1) % 110), 1)).logits
    ahead = float((logits[:, 0] - changed[:, 0]).abs().max()) > 1e-3
    row["decoder"] = ahead and "is_decoder" in model.config.to_dict()
    row["model"] = tiny_model(family, is_decoder=True) if row["decoder"] else model
    return bool(torch.isfinite(logits).all()) or "its logits are not finite"


def _captured(model: PreTrainedModel, tokens: Tensor) -> bool | str:
    with torch.no_grad():
        expected = model(tokens).logits
    teacher = Teacher(model)
    teacher.check_shows_attention()
    said = teacher({"input_ids": tokens}, attentions=True, logits=True)
    teacher.restore()
    error = float((said.logits - expected).norm() / expected.norm())
    return error < 1e-4 or f"logits differ by {error:.1e} when attention is recorded"


def _students(teacher: PreTrainedModel, row: Row) -> list[CABHybridForCausalLM | None]:
    readings, left_out = read_attention(teacher)
    if not readings:
        raise ValueError("; ".join(dict.fromkeys(left_out.values())))
    row["read"] = max(max(one.errors.values()) for one in readings.values())
    row["exactness"], row["kept"] = exactness(teacher), len(left_out)
    options = {"accept_inexact": float("inf")}
    student = hybrid_from_teacher(teacher, keep_attention=list(left_out), **options)
    paths = list(readings)
    if len(paths) == 1:
        return [student, None]
    return [student, hybrid_from_teacher(teacher, keep_attention=[*left_out, *paths[1::2]], **options)]


@torch.no_grad()
def _forward(teacher: PreTrainedModel, student: PreTrainedModel, tokens: Tensor) -> bool:
    logits = student(tokens).logits
    return bool(torch.isfinite(logits).all()) and logits.shape == teacher(tokens).logits.shape


def _gradients(student: CABHybridForCausalLM, tokens: Tensor) -> bool | str:
    student(tokens, use_cache=False).logits.float().square().mean().backward()
    without = [
        f"{path}.{name}"
        for path, adapter in student.mixers.items()
        for name, parameter in adapter.mixer.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    student.zero_grad()
    return not without or f"{len(without)} parameters have no gradient, such as {without[0]}"


def _continued(model: PreTrainedModel, tokens: Tensor, **options: Any) -> Tensor:
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with evaluating(model):
        return model.generate(tokens, **settings, **options)


def _cache(model: PreTrainedModel, tokens: Tensor) -> bool:
    return torch.equal(*(_continued(model, tokens, use_cache=use_cache) for use_cache in (True, False)))


def _left_padding(model: PreTrainedModel, tokens: Tensor) -> bool:
    padding = torch.zeros(len(tokens), 3, dtype=torch.long)
    mask = torch.cat((padding, torch.ones_like(tokens)), 1)
    padded = _continued(model, torch.cat((padding, tokens), 1), attention_mask=mask)
    return torch.equal(padded[:, 3:], _continued(model, tokens))


@torch.no_grad()
def _reloaded(student: CABHybridForCausalLM, tokens: Tensor, remote: bool) -> bool | str:
    """With `remote`, by the code in the folder, as `trust_remote_code` loads it where this package is not imported."""
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        name = student.hub_classes["AutoModelForCausalLM"]
        loader = get_class_from_dynamic_module(name, folder) if remote else AutoModelForCausalLM
        loaded = loader.from_pretrained(folder).eval()
    expected = student(tokens).logits
    difference = float((loaded(tokens).logits - expected).abs().max() / expected.abs().max())
    return difference < 1e-5 or f"logits differ by {difference:.1e} of the largest"


def _apart(family: str) -> Row:
    """`check_family` in a process that may crash, hang or run out of memory by itself."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        signal.alarm(_SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(1)
        sys.stderr = sys.stdout = open(os.devnull, "w")
        try:
            row = _noted(lambda: check_family(family))
            row = row if isinstance(row, dict) else {"family": family, "built": row}
            os.write(write_end, json.dumps(row).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    reason = f"it takes more than {_SECONDS} s" if status == signal.SIGALRM else f"its process ended with {status}"
    return json.loads(data) if data else {"family": family, "built": reason}

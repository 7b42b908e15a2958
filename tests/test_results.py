"""Figures of README and of docs/results.md are those of the result files."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest


ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "docs/results.md"
TEXTS = ("speeches", "python docs", "brown (out of domain)")
TOKENS = ("5M tokens", "20M tokens", "60M tokens")
SHARES = ("1 %", "5 %", "10 %", "20 %", "100 %")
DEFAULT = "text, samples and continuations, state of 128"


def result(path: str) -> dict:
    return json.loads((ROOT / "benchmarks" / path).read_text())


def measures(grid: str) -> dict:
    return result(f"quality/{grid}/table.json")["measures"]


def row(page: Path, start: str) -> list[str]:
    """The cells of the page's only table row whose first cell starts so."""
    lines = [line for line in page.read_text().splitlines() if line.startswith(f"| {start}")]
    assert len(lines) == 1, (start, lines)
    return [cell.strip() for cell in lines[0].strip("|").split("|")][1:]


@pytest.mark.parametrize(
    ("start", "method"),
    [
        ("training from scratch", "from scratch"),
        ("soft KD, same", "soft KD"),
        ("CAB, same", "CAB"),
        ("weight reuse, then", "weight reuse"),
        ("**outputs", "outputs, then KL"),
    ],
)
def test_cifar10(start, method):
    top1, kl = (measures("cifar10")[name][method] for name in ("top1", "kl"))
    assert {top1[share]["n"] for share in SHARES} == {3}
    assert row(RESULTS, start) == [
        f"{top1[share]['mean']:.3f} ± {top1[share]['std']:.3f} / {kl[share]['mean']:.2f}" for share in SHARES
    ]


@pytest.mark.parametrize(
    ("start", "method"), [("soft KD", "soft KD"), ("CAB", "CAB"), ("**our default", "outputs, then KL")]
)
def test_cifar10_in_the_readme(start, method):
    cells = [measures("cifar10")["top1"][method][share] for share in ("1 %", "10 %", "100 %")]
    assert row(README, start) == [f"{cell['mean']:.3f} ± {cell['std']:.3f}" for cell in cells]


@pytest.mark.parametrize(
    ("start", "method"),
    [
        ("training from scratch", "from scratch"),
        ("soft KD, same", "soft KD"),
        ("CAB, same", "CAB"),
        ("weight reuse, then", "weight reuse"),
        ("outputs, then KL", "outputs, then KL"),
    ],
)
def test_digits(start, method):
    top1, kl = (measures("digits")[name][method] for name in ("top1", "kl"))
    assert {cell["n"] for cell in top1.values()} == {3}
    assert row(RESULTS, f"digits: {start}") == [
        f"{top1[share]['mean']:.3f} / {kl[share]['mean']:.2f}" for share in SHARES[1:]
    ]


def over_tokens(measure: str, method: str = DEFAULT) -> list[float]:
    return [measures("smollm2_long")[measure][method][tokens]["mean"] for tokens in TOKENS]


@pytest.mark.parametrize(
    ("start", "text"),
    [("speeches", TEXTS[0]), ("Python documentation", TEXTS[1]), ("Brown corpus, never trained on", TEXTS[2])],
)
def test_the_language_default(start, text):
    ratios = [f"{ratio:.2f}" for ratio in over_tokens(f"{text}: ppl ratio")]
    kls = [f"{kl:.2f}" for kl in over_tokens(f"{text}: KL")]
    assert row(RESULTS, f"{start} |") == [f"{kl} / {ratio}" for kl, ratio in zip(kls, ratios)]
    hybrid = result("quality/windows/facts/report.json")["after"][text]["perplexity_ratio"]
    assert row(README, f"perplexity ratio: {start}") == [*ratios, f"**{hybrid:.2f}**"]


@pytest.mark.parametrize("gap", [16, 64, 256])
def test_copying(gap):
    teacher = over_tokens(f"copying, gap {gap}, teacher")[-1]
    shown = [f"{recall:.2f}" for recall in over_tokens(f"copying, gap {gap}")]
    assert row(RESULTS, f"random tokens copied over a gap of {gap}, teacher {teacher:.2f}") == shown
    if gap == 64:
        found = result("quality/windows/facts/report.json")["after"][TEXTS[0]]["recall"]["64"]
        assert row(README, "repeated after 64 tokens") == [*shown, f"**{found['student']['recall']:.2f}**"]
        assert f"The teacher's share is {teacher:.2f}." in README.read_text()


@pytest.mark.parametrize(
    ("start", "method"),
    [
        ("text alone", "text without repeats"),
        ("and repeats in a quarter", "text"),
        ("and 4M tokens", "text and samples"),
        ("and a state of 128", "text and samples, state of 128"),
        ("and 8M tokens", DEFAULT),
    ],
)
def test_parts_of_the_language_default(start, method):
    names = ("speeches: KL", "brown (out of domain): KL", "copying, gap 64")
    cells = [measures("smollm2_long")[name][method]["20M tokens"]["mean"] for name in names]
    assert row(RESULTS, start) == [f"{value:.2f}" for value in cells]


def test_bars_of_the_language_default():
    at_60m = {measure: over_tokens(measure)[-1] for measure in measures("smollm2_long")}
    assert max(at_60m[f"{text}: KL"] for text in ("speeches", "python docs")) <= 0.25
    assert at_60m["brown (out of domain): KL"] <= 0.45 and at_60m["brown (out of domain): ppl ratio"] <= 1.35
    assert at_60m["copying, gap 64"] >= 0.5 * at_60m["copying, gap 64, teacher"]


@pytest.mark.parametrize(
    ("start", "method"),
    [
        ("mixer outputs, then KL", "outputs, then KL"),
        ("KL alone, same start", "fitted weights, KL"),
        ("outputs, then KL, half", "half as deep, outputs, then KL"),
        ("labels alone, same start", "labels alone"),
        ("weights copied, usual Mamba-2", "weight reuse, KL"),
        ("weights copied, not fitted, KL", "weight reuse, not fitted, KL"),
        ("random mixers: bridge, then KL", "CAB"),
        ("random mixers: bridge beside", "random mixers, KL and bridge"),
        ("random mixers: bridge as the paper", "CAB, not centered"),
        ("random mixers: mixer outputs", "random mixers, outputs, then KL"),
        ("random mixers: KL alone |", "random mixers, KL"),
        ("random mixers: KL alone, four times", "random mixers, KL, longer warm-up"),
        ("random mixers: KL alone, a third", "random mixers, KL, 4e-4"),
        ("weights copied, not fitted, MOHAWK", "MOHAWK"),
        ("Mamba-2 from scratch: labels", "from scratch, labels alone"),
        ("Mamba-2 from scratch: KL alone", "from scratch, KL"),
        ("Mamba-2 from scratch: bridge beside", "from scratch, KL and bridge"),
        ("Mamba-2 from scratch: bridge, then", "from scratch, CAB"),
    ],
)
def test_language_methods(start, method):
    cells = [measures("smollm2")[f"{text}: KL"][method]["5M tokens"] for text in TEXTS]
    shown = [f"{cell['mean']:.2f}" + f" ± {cell['std'] or 0:.2f}" * (cell["n"] > 2) for cell in cells]
    assert row(RESULTS, start) == shown


@pytest.mark.parametrize(
    ("start", "method"),
    [
        ("no attention: the pure class", "pure"),
        ("no attention: a hybrid", "hybrid, 0 kept"),
        ("2 of 30 layers kept", "hybrid, 2 kept"),
        ("4 of 30 layers kept", "hybrid, 4 kept"),
    ],
)
def test_kept_attention(start, method):
    names = [f"{text}: KL" for text in TEXTS] + [f"copying, gap {gap}" for gap in (16, 64, 256, 1024)]
    found = [measures("hybrids")[name][method]["5M tokens"]["mean"] for name in names]
    assert row(RESULTS, start) == [f"{mean:.2f}" for mean in found]


@pytest.mark.parametrize(("control", "start"), [("window", "a window"), ("zeroed", "without its mixers")])
def test_the_controls_of_the_hybrid(control, start):
    found = result(f"quality/hybrids/four/{control}/evaluation.json")
    texts = [f"{found['texts'][text]['kl']:.2f} / {found['texts'][text]['perplexity_ratio']:.2f}" for text in TEXTS]
    copied = found["recall"]["copying"]["256"]["student"]["recall"]
    assert row(RESULTS, start) == [*texts, f"{copied:.2f}"]
    if control == "window":
        ratio = found["texts"]["speeches"]["perplexity_ratio"]
        assert f"with a window of 64 tokens, [{ratio:.2f}](docs/results.md)" in README.read_text()


@pytest.mark.parametrize("length", [512, 2048])
@pytest.mark.parametrize("window", [64, 256])
def test_windows_that_nobody_trained(window, length):
    cells = {
        cell["text"]: cell
        for cell in result("quality/hybrids/windows_cpu.json")["cells"]
        if (cell["window"], cell["length"]) == (window, length)
    }
    shown = [
        f"{cells[text]['kl']:.3f} / {cells[text]['perplexity_ratio']:.2f}"
        for text in ("speeches", "python_docs", "brown")
    ]
    assert row(RESULTS, f"window of {window}, rows of {length:,}") == shown


def test_what_the_readme_says_of_the_hybrid():
    evaluation, text = result("quality/windows/facts/evaluation.json"), README.read_text()
    found = evaluation["recall"]["copying"]["1024"]
    shares = [f"{found[who]['recall']:.2f}" for who in ("student", "teacher")]
    assert "the hybrid {}, its teacher {}.".format(*shares) in text
    found = evaluation["length"]["retrieval"]["needles"]["4096"]
    assert found["student"]["recall"] >= found["teacher"]["recall"]
    assert "finds one of four facts in 4,096 tokens as well as its teacher" in text
    tokens = result("quality/windows/facts/report.json")["train_tokens"]
    assert f"| {tokens / 1e6:.0f}M, hybrid |" in text


def long_run(folder: str, report: str = "report") -> dict:
    return result(f"quality/hybrids/{folder}/{report}.json")["after"]


def of_pure_students(measure: str) -> float:
    return measures("distinct_text")[measure]["text and english"]["60M tokens"]["mean"]


def test_long_runs_of_hybrids():
    gaps = ("16", "64", "256", "1024")
    for start, after in (
        ("four layers, evenly", long_run("four")),
        ("four layers, as `auto`", long_run("auto", "report_long")),
        ("pure, its last", result("quality/pure_long/report.json")["after"]),
        ("pure, memories", result("quality/fitted/report.json")["after"]),
    ):
        shown = [f"{after[text]['kl']:.3f} / {after[text]['perplexity_ratio']:.2f}" for text in TEXTS]
        copied = after["speeches"]["recall"]
        for who in ("student", "teacher")[: 1 + start.endswith("evenly")]:
            recalls = [f"{copied[gap][who]['recall']:.2f}" for gap in gaps]
            if who == "student":
                assert row(RESULTS, f"long run: {start}") == [*shown, *recalls]
            else:
                assert row(RESULTS, "long run: the teacher's own copying") == ["", "", "", *recalls]
    kls, ratios = ([of_pure_students(f"{text}: {measure}") for text in TEXTS] for measure in ("KL", "ppl ratio"))
    recalls = [f"{of_pure_students(f'copying, gap {gap}'):.2f}" for gap in gaps]
    shown = [f"{kl:.3f} / {ratio:.2f}" for kl, ratio in zip(kls, ratios)]
    assert row(RESULTS, "long run: pure |") == [*shown, *recalls]
    for folder in ("pure_long", "fitted"):
        found = result(f"quality/{folder}/evaluation.json")["tasks"]["above_chance"]
        file = f"../benchmarks/quality/{folder}/evaluation.json"
        low, high = found["share_ci95"]
        assert f"keeps [{found['share']:.2f}]({file}) ({low:.2f} to {high:.2f})" in RESULTS.read_text()
    begins = [result("quality/fitted/report.json")["before"]["speeches"]["kl"]]
    control = "quality/distinct_text/runs/text-and-english__60m-tokens__seed0.json"
    begins.append(result(control)["before"]["speeches"]["kl"])
    assert "at a KL on speeches of {:.2f} for {:.2f}".format(*begins) in RESULTS.read_text()
    fitted = result("quality/fitted/report.json")["after"]
    assert all(fitted[text]["kl"] > of_pure_students(f"{text}: KL") for text in TEXTS)
    assert fitted["speeches"]["recall"]["256"]["student"]["recall"] < of_pure_students("copying, gap 256")
    english = long_run("four")["english"]
    assert f"the hybrid has {english['kl']:.3f} / {english['perplexity_ratio']:.2f};" in RESULTS.read_text()


@pytest.mark.parametrize(
    ("start", "test"), [("one needle", "needle"), ("four needles", "needles"), ("eight values", "key-value")]
)
def test_what_the_hybrid_finds(start, test):
    by_length = result("quality/hybrids/four/evaluation.json")["length"]["retrieval"][test].values()
    shown = [f"{one['student']['recall']:.2f} / {one['teacher']['recall']:.2f}" for one in by_length]
    assert row(RESULTS, f"found: {start}") == shown


def test_tasks_and_lengths_of_the_hybrid():
    evaluation, text = result("quality/hybrids/four/evaluation.json"), RESULTS.read_text()
    found = evaluation["tasks"]["above_chance"]
    low, high = found["share_ci95"]
    assert f"In tasks it keeps {found['share']:.2f} ({low:.2f} to {high:.2f}) of its teacher's margin" in text
    holds = evaluation["length"]["holds_to"]
    assert holds == {"needle": 1024, "needles": 0, "key-value": 0, "copying": 256, "loss": 4096, "all": 0}
    assert (
        "its loss holds to 4,096 tokens, one needle to 1,024, copying to 256, several needles and keys to no" in text
    )
    copied = evaluation["recall"]["copying"]["4096"]
    shown = " and ".join(f"{copied[who]['recall']:.2f}" for who in ("student", "teacher"))
    assert f"Over 4,096 neither copies: {shown}." in text
    assert f"It took {result('quality/hybrids/four/report.json')['seconds'] / 60:.1f} minutes" in text


WINDOWS = {
    "windows alone, not trained": "none_untrained",
    "windows alone, trained": "none",
    "windows and four layers, not trained": "four_untrained",
    "windows and four layers, trained without facts": "four",
    "windows and four layers, trained with facts": "facts",
}


@pytest.mark.parametrize("start", [*WINDOWS, "windows and four layers, trained without facts, its mixers zeroed"])
def test_windows_beside_mixers(start):
    folder = WINDOWS.get(start)
    found = result(f"quality/windows/{f'{folder}/rows_2048' if folder else 'four/zeroed/evaluation'}.json")
    texts = [f"{found['texts'][text]['kl']:.3f} / {found['texts'][text]['perplexity_ratio']:.2f}" for text in TEXTS]
    assert row(RESULTS, start + (": `lm_hybrid` |" if folder == "facts" else " |")) == texts


@pytest.mark.parametrize("start", [*WINDOWS, "the teacher"])
def test_what_windows_and_layers_find(start):
    who = "teacher" if start == "the teacher" else "student"
    found = result(f"quality/windows/{WINDOWS.get(start, 'four')}/evaluation.json")
    retrieval, copying = found["length"]["retrieval"], found["recall"]["copying"]
    shares = [copying[gap][who]["recall"] if gap in copying else None for gap in ("64", "256", "1024")]
    places = (("needle", "1024"), ("needle", "4096"), ("needles", "4096"), ("key-value", "4096"))
    shares += [retrieval[test][length][who]["recall"] for test, length in places]
    shares.append(1.0 if who == "teacher" else found["tasks"]["above_chance"]["share"])
    assert row(RESULTS, f"recall: {start} |") == ["" if share is None else f"{share:.2f}" for share in shares]


def test_what_is_said_of_windows():
    text = RESULTS.read_text()
    reports, found = (
        {folder: result(f"quality/windows/{folder}/{name}.json") for folder in ("four", "facts")}
        for name in ("report", "evaluation")
    )
    minutes = {
        folder: f"It took {report['seconds'] / 60:.1f} minutes on one H200" for folder, report in reports.items()
    }
    assert f"{minutes['four']}, beside another run, one seed" in text
    assert f"{minutes['facts']}, beside evaluations of another student and without the choice" in text
    layers = reports["four"]["kept_attention"]["layers"]
    assert layers == result("quality/windows/four/keep_attention.json")["layers"] == [17, 18, 20, 23]
    tasks = []
    for folder in ("four", "facts"):
        margin = found[folder]["tasks"]["above_chance"]
        low, high = margin["share_ci95"]
        tasks.append(f"{margin['share']:.2f} ({low:.2f} to {high:.2f})")
        copied = found[folder]["recall"]["copying"].values()
        assert all(one["student"]["recall"] > one["teacher"]["recall"] for one in copied)
    assert "Training costs a little in tasks: {} without facts, {} with them.".format(*tasks) in text
    needles = [found["four"]["length"]["retrieval"][test]["4096"] for test in ("needle", "needles")]
    shares = [one["student"]["recall"] / one["teacher"]["recall"] for one in needles]
    assert f"of single needles it finds {shares[0]:.2f} of the teacher's there, of four {shares[1]:.2f}" in text
    trained, zeroed = (result(f"quality/windows/four/{name}.json") for name in ("rows_2048", "zeroed/evaluation"))
    falls = [1 - trained["texts"][text]["kl"] / zeroed["texts"][text]["kl"] for text in TEXTS[:2]]
    assert 0.35 < falls[0] < 0.45 and 0.2 < falls[1] < 0.3
    size, teacher = (reports["facts"][f"{who}_parameters"] / 1e6 for who in ("student", "teacher"))
    assert f"`lm_default`'s has 178M for {teacher:.0f}M, `lm_hybrid`'s {size:.0f}M." in README.read_text()


def test_what_facts_bring():
    text = RESULTS.read_text()
    four, facts = (result(f"quality/windows/{folder}/evaluation.json") for folder in ("four", "facts"))
    with_facts, without = (one["length"]["retrieval"]["needles"]["4096"] for one in (facts, four))
    found = [with_facts["student"]["recall"], without["student"]["recall"], with_facts["teacher"]["recall"]]
    assert "it finds {:.2f}, without facts {:.2f}, the teacher {:.2f}.".format(*found) in text
    theirs, ours = (result(f"quality/windows/{folder}/rows_2048.json")["texts"] for folder in ("four", "facts"))
    more = [ours[name]["kl"] - theirs[name]["kl"] for name in ours]
    assert f"a KL that is {min(more):.3f} to {max(more):.3f} higher" in text
    bars = [one for one in result("quality/bars.json")["bars"] if one["name"].startswith("hybrid")]
    assert len(bars) == 3 and all(one["met"] for one in bars)
    (smallest,) = (one["figures"]["up to 4096"] for one in bars if "up to 4096" in one["figures"])
    assert f"up to 4,096 tokens: its smallest share is {smallest:.2f}." in text
    holds = facts["length"]["holds_to"]
    assert holds == {"needle": 4096, "needles": 4096, "key-value": 4096, "copying": 1024, "loss": 1024, "all": 1024}
    assert four["length"]["holds_to"]["all"] == 256 and "without facts it holds to 256" in text


@pytest.mark.parametrize(
    ("start", "method"),
    [
        ("at 2.4e-3", "outputs, then KL, 2.4e-3"),
        ("outputs", "outputs, then KL, 1.2e-3"),
        ("KL alone", "KL, 1.2e-3"),
        ("CAB", "CAB, 1.2e-3"),
    ],
)
def test_half_as_deep(start, method):
    found = {name: cells[method]["20M tokens"]["mean"] for name, cells in measures("half_depth").items()}
    texts = (*TEXTS, "english")
    shown = [f"{found[f'{text}: KL']:.3f} / {found[f'{text}: ppl ratio']:.2f}" for text in texts]
    assert row(RESULTS, f"half as deep: {start}") == shown
    assert all(found[f"copying, gap {gap}"] < 0.001 for gap in (16, 64, 256, 1024))


def test_methods_are_counted():
    assert f"[All {len(measures('smollm2')['speeches: KL'])}]" in RESULTS.read_text()
    students = set(measures("small_lm")["speeches: KL"]) - {"the teacher itself, labels"}
    assert f"[{len(students)} methods]" in RESULTS.read_text()


@pytest.mark.parametrize(
    ("start", "method"),
    [
        ("outputs, then KL and bridge", "outputs, then KL and bridge"),
        ("outputs, then KL |", "outputs, then KL"),
        ("KL alone, same start", "fitted weights, KL"),
        ("MOHAWK", "MOHAWK"),
        ("the bridge, as the paper", "CAB on the same start"),
        ("from scratch", "from scratch, KL"),
        ("random mixers, KL alone", "random mixers, KL"),
        ("random mixers, bridge, centered", "random mixers, CAB centered"),
        ("random mixers, bridge as the paper", "random mixers, CAB"),
    ],
)
def test_small_language_methods(start, method):
    cell = measures("small_lm")["speeches: KL"][method]["2M tokens"]
    assert row(RESULTS, f"small: {start}") == [f"{cell['mean']:.3f}"]


@pytest.mark.parametrize(
    ("start", "method"),
    [
        ("1 % of the training text", "1 % of the text"),
        ("1 % of it, and", "1 %, and samples that continue it"),
        ("1M tokens that the teacher", "samples from nothing alone"),
        ("all of the training text", "all of the text"),
    ],
)
def test_little_data(start, method):
    cells = [measures("samples")[f"{text}: KL"][method]["2M tokens"] for text in (TEXTS[0], TEXTS[2])]
    assert row(RESULTS, start) == [f"{cell['mean']:.3f}" for cell in cells] and {cell["n"] for cell in cells} == {2}


@pytest.mark.parametrize("method", ["from scratch", "soft KD", "CAB"])
def test_quickstart_vision(method):
    report = result("quality/quickstart_vision/results_cpu.json")
    assert row(RESULTS, f"quickstart: {method}") == [f"{report['summary'][method]['student_top1_mean']:.3f}"]


def test_demo():
    report = result("quality/quickstart_lm/report_cpu.json")
    (before,), (after,) = report["before"].values(), report["after"].values()
    for start, numbers in (("student, weights copied", before), ("student, distilled", after)):
        shown = [f"{numbers['student_perplexity']:.1f}", f"{numbers['kl']:.2f}", f"{numbers['agreement']:.2f}"]
        assert row(RESULTS, start) == shown
    assert row(RESULTS, "teacher, SmolLM2-135M-Instruct") == [f"{after['teacher_perplexity']:.1f}", "", ""]
    for page in (README, RESULTS):
        assert f"{report['seconds'] / 60:.1f} minutes" in page.read_text()
    (spaced,) = result("quality/quickstart_lm/report_log_spaced_cpu.json")["after"].values()
    shown = f"a perplexity of {spaced['student_perplexity']:.1f} and a KL of {spaced['kl']:.2f}"
    assert f"the same recipe ended at {shown}" in RESULTS.read_text()


def test_starts():
    results, start = result("quality/starts/starts_cpu.json")["results"], "copied, transparent, moving averages"
    names = ("RMS", "output projections fitted on 4,096 tokens", "memories, too, fitted on 4,096 tokens")
    for name, shown in zip(names, ("outputs scaled", "output proj", "memories and output proj")):
        perplexity = results[f"{start}; {name}"]["student_perplexity"]
        assert row(RESULTS, f"start: copied weights, {shown}") == [f"{perplexity:,.0f}"]


@pytest.mark.parametrize(
    ("start", "file", "name"),
    [
        ("teacher forward and student step", "distillation_step_h200.json", "ceiling of the parts"),
        ("KD, eager", "distillation_step_h200.json", "kd"),
        ("KD, `cuda_graph: true` |", "distillation_step_h200_kernel.json", "kd, cuda graph"),
        ("KD and bridge, `cuda_graph", "distillation_step_h200_kernel.json", "kd + bridge, cuda graph"),
        ("KD, `cuda_graph: true`, all", "distillation_step_h200_logits.json", "kd, all logits at once, cuda graph"),
        ("KD, `cuda_graph: true`, `torch", "distillation_step_h200_kernel.json", "kd, torch.compile, cuda graph"),
        ("KD and bridge, both", "distillation_step_h200_kernel.json", "kd + bridge, torch.compile, cuda graph"),
    ],
)
def test_speed_of_a_step(start, file, name):
    measured = result(f"speed/results/{file}")["results"]["32x512"][name]
    memory = f"{measured['peak_gib']:.1f} GiB" if "peak_gib" in measured else ""
    assert row(RESULTS, start) == [f"{measured['tokens_per_second'] / 1e3:.0f} k", memory]


@pytest.mark.parametrize(
    ("start", "name"),
    [
        ("the released training loop", "released, float32, script"),
        ("the released model", "released, bfloat16, bare"),
        ("ours under the Trainer, float32", "ours, float32, cuda graph"),
        ("ours under the Trainer, bfloat16", "ours, bfloat16, cuda graph"),
    ],
)
def test_the_released_code(start, name):
    results = result("speed/results/released_step_h200.json")["results"]
    assert row(RESULTS, start) == [f"{results[name]['images_per_second']:.0f}"]


def test_decoding():
    cells = result("speed/results/decode_cpu.json")["cells"]
    for model in ("teacher", "student"):
        of_int8 = {c["context"]: c["ms"] for c in cells if (c["model"], c["dtype"]) == (model, "int8")}
        assert row(RESULTS, f"int8: {model}") == [f"{of_int8[context]:.0f}" for context in (1024, 8192)]
    cells = {(c["model"], c["context"]): c for c in cells if c["dtype"] == "float32"}
    picture = (ROOT / "docs/bridge.svg").read_text()
    for start, model in (("Transformer teacher", "teacher"), ("Mamba student", "student")):
        shown = [f"{cells[model, context]['ms']:.0f}" for context in (1024, 4096, 32768)]
        memory = f"{cells[model, 32768]['cache_mib']:,.0f} MiB"
        assert row(RESULTS, start) == [*shown, memory]
        assert f">{memory}<" in picture


@pytest.mark.parametrize(
    ("start", "model", "way", "rows"),
    [
        ("one row: student |", "student", "generate()", 1),
        ("one row: student without", "student", "eager", 1),
        ("one row: teacher with", "teacher", "static", 1),
        ("one row: teacher as", "teacher", "generate()", 1),
        ("16 rows: student", "student", "generate()", 16),
        ("16 rows: teacher with", "teacher", "static", 16),
        ("64 rows: student", "student", "generate()", 64),
        ("64 rows: teacher with", "teacher", "static", 64),
        ("64 rows: teacher as", "teacher", "generate()", 64),
        ("one row: hybrid", "hybrid", "generate()", 1),
        ("one row: windows of 256 tokens, and", "hybrid, windows", "generate()", 1),
        ("one row: windows of 256 tokens alone", "windows", "generate()", 1),
    ],
)
def test_tokens_of_generate(start, model, way, rows):
    cells = [
        next((c["ms"] for c in result("speed/results/generate_h200.json")["cells"] if key.items() <= c.items()), None)
        for context in (512, 32000)
        for key in ({"model": model, "way": way, "batch_size": rows, "context": context},)
    ]
    assert row(RESULTS, start) == ["" if ms is None else f"{ms:.1f}" if ms > 10 else f"{ms:.2f}" for ms in cells]


def test_decoding_and_serving_in_the_readme():
    """Whatever the README's two paragraphs say in figures stands in a file."""
    text, cells = README.read_text(), result("speed/results/generate_h200.json")["cells"]

    def ms(model, way, context, rows=1):
        wanted = {"model": model, "way": way, "batch_size": rows, "context": context}
        return next(cell["ms"] for cell in cells if wanted.items() <= cell.items())

    near, far = (f"{ms('student', 'generate()', context):.1f}" for context in (512, 32000))
    assert f"takes {near} ms a token after 512 tokens, {far} after 32,000" in text
    hybrid = ms("hybrid", "generate()", 32000)
    windows = ms("hybrid, windows", "generate()", 32000)
    assert f"Hybrids take {hybrid:.1f} ms a token on an H200, with windows {windows:.1f}," in text
    near, far = (f"{ms('teacher', 'static', context):.1f}" for context in (512, 32000))
    assert f"takes {near} and {far} ms with a static cache" in text
    teachers = min(ms("teacher", way, 32000, 64) for way in ("static", "generate()"))
    times = teachers / ms("student", "generate()", 32000, 64)
    assert f"With 64 texts of 32,000 tokens the student is {times:.0f} times as fast" in text
    engine = result("serving/results/engine_cpu.json")
    teacher, student = (
        next(cell for cell in engine[name]["cells"] if (cell["rows"], cell["context"]) == (16, 7600))
        for name in ("teacher", "student")
    )
    writes = f"{student['decode_tokens_per_s']:.0f} tokens a second against {teacher['decode_tokens_per_s']:.0f}"
    holds = [f"{engine[name]['rows_that_fit']:.0f}" for name in ("student", "teacher")]
    assert f"{writes}, with 16 texts of 7,600" in text
    assert f"holds {holds[0]} texts of 8,144 tokens for the student and {holds[1]} for the teacher" in text
    on_gpu = result("serving/results/engine_h200.json")
    pairs = zip(on_gpu["teacher"]["cells"], on_gpu["student"]["cells"], strict=True)
    assert all(one["decode_tokens_per_s"] > other["decode_tokens_per_s"] for one, other in pairs)


def test_families_of_the_readme():
    page = (ROOT / "docs/coverage.md").read_text()
    counts = re.search(r"Of (\d+) families .* (\d+) become students .* of (\d+) of .* of (\d+) not", page).groups()
    text = README.read_text()
    assert f"Of the {counts[0]} causal families" in text and f"{counts[1]} become working students" in text
    assert f"{counts[2]} read their teacher's attention exactly, {counts[3]} approximate it" in text


@pytest.mark.parametrize("model", ["student", "mamba_ssm"])
def test_captured_tokens(model):
    cells = result("speed/results/generate_h200.json")["cells"]
    found = [cell["ms"] for cell in cells if (cell["model"], cell["way"]) == (model, "step")]
    assert row(RESULTS, f"graph: {model}") == [f"{ms:.2f}" for ms in found]


@pytest.mark.parametrize(
    ("start", "name"),
    [("input", "in_proj"), ("output", "out_proj"), ("gate and up", "gate and up"), ("down", "down")],
)
def test_projections_of_few_rows(start, name):
    """Beside the library the program that `decode_kernels.linear` took, with 512 columns."""
    cells = [one for one in result("speed/results/projections_h200.json")["cells"] if one["projection"] == name]
    shown = []
    for rows in (2, 16, 64):
        columns = 128 if rows > 32 and name in ("in_proj", "gate and up") else 512
        program = {"features": 32, "warps": 4, "columns": columns}
        library = next(one["us"] for one in cells if (one["rows"], one["way"]) == (rows, "library"))
        own = next(one["us"] for one in cells if ({"rows": rows} | program).items() <= one.items())
        shown.append(f"{library:.1f} / {own:.1f}")
    assert row(RESULTS, f"projected: {start}") == shown


def test_a_step_again_and_tests_of_decoding():
    cells = {(one["way"], one["bridge"]): one for one in result("speed/results/scale_h200.json")["cells"]}
    small, large = cells["compile+graph", False], cells["compile+graph, chunks of 256", False]
    bridge = cells["compile+graph", True]
    speeds = [f"{cell['tokens_per_second'] / 1e3:.0f} k" for cell in (small, large, bridge)]
    text, (profile,) = RESULTS.read_text(), result("speed/results/scale_h200_profile.json")["cells"]
    assert "{} tokens/s, in chunks of 256 {}, with the bridge {} (".format(*speeds) in text
    more = [bridge[key] - small[key] for key in ("ms", "peak_gib")]
    assert "The bridge then adds {:.1f} ms and {:.1f} GiB.".format(*more) in text
    kernels = profile["kernels"]

    def ms(*names: str) -> float:
        return sum(one["ms"] for one in kernels if one["kernel"].startswith(names))

    products, sums = ms("nvjet"), ms("void at::native::reduce_kernel")
    of_all = f"{products:.0f} of {ms(''):.0f} ms on the device were the library's matrix products"
    assert f"{of_all}, and {sums:.0f} sums" in text
    outcomes = result("speed/results/gpu_tests_decoding_h200.json")["outcomes"]
    assert set(outcomes.values()) == {"passed"} and f"[{len(outcomes)} tests]" in text


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_first_tokens(model):
    cells = [one for one in result("speed/results/generate_h200.json")["prefill"] if one["model"] == model]
    places = [(512, None), (2048, None), (8192, None), (32768, None), (131072, None), (131072, 8192)]
    by_place = {(one["context"], one["piece"]): one for one in cells}
    for name, key in (("milliseconds", "ms"), ("MiB", "peak_mib")):
        shown = [f"{by_place[place][key]:,.0f}" if place in by_place else "" for place in places]
        assert row(RESULTS, f"first token, {model}, {name}") == shown


@pytest.mark.parametrize(("start", "method"), [("the bridge", "bridge"), ("whole attention maps", "matrix")])
def test_alignment(start, method):
    cells = [
        next(c for c in result(f"speed/results/alignment_{device}.json")["cells"] if (c["method"], c["tokens"]) == key)
        for device, key in (("cpu", (method, 4096)), ("h200", (method, 16384)))
    ]
    shown = [f"{cell['ms']:,.0f} ms, {cell['peak_mib']:,.0f} MiB" for cell in cells]
    assert row(RESULTS, f"alignment: {start}") == shown


@pytest.mark.parametrize(
    ("start", "case", "variant"),
    [
        ("S6, ours", "s6", "torch"),
        ("S6, transformers'", "s6", "transformers"),
        ("SSD, ours", "ssd", "torch"),
        ("SSD, transformers'", "ssd", "transformers_64"),
    ],
)
def test_scans(start, case, variant):
    cells = {
        (c["case"], c["variant"]): c["forward_backward_ms"] for c in result("speed/results/ssm_ops_cpu.json")["cells"]
    }
    assert row(RESULTS, f"scan: {start}") == [f"{cells[case, variant]:,.0f}"]
    assert cells["ssd", "transformers_64"] < cells["ssd", "transformers_256"]


@pytest.mark.parametrize("text", ["random tokens", "repeats"])
def test_toy(text):
    recalls = result("quality/recall/toy_cpu.json")["students"][f"{text}, fitted weights"]["recall"].values()
    assert row(RESULTS, f"toy: {text}") == [f"{recall:.2f}" for recall in recalls]


@pytest.mark.parametrize(
    ("start", "mixer"),
    [
        ("SSD |", "SSD"),
        ("gated delta rule", "gated delta rule"),
        ("SSD, keys and queries", "SSD, unit length"),
    ],
)
def test_recurrences(start, mixer):
    report = result("quality/recurrences/recurrences_cpu.json")
    language, copying = report["small_lm"], report["toy"]
    for name, kind in (("recurrence", "means"), ("longer", "longer")):
        shown = [f"{language[kind][mixer][f'{text}: KL']:.3f}" for text in (TEXTS[0], TEXTS[2])]
        shown += [f"{copying[kind][mixer][f'gap {gap}']:.2f}" for gap in (1, 8, 24)]
        assert row(RESULTS, f"{name}: {start}") == shown
    for part, times in ((language, 4), (copying, 5)):
        seeds = f"{part['chosen'][mixer]['rate']:g}, {part['steps']} steps, seed"
        assert sum(seeds in key for key in part["runs"][mixer]) >= 2
        assert part["longer"][mixer]["steps"] == times * part["steps"]
    took = [f"{language['step_ms'][name]:.0f}" for name in ("SSD", "gated delta rule")]
    assert "takes {} ms of one core with SSD, {} with the delta rule".format(*took) in RESULTS.read_text()


def test_turning_states_that_were_cut_off():
    cut = result("quality/rotary/unfinished_h200.json")
    control = [entry for stage in result("quality/fitted/report.json")["stages"] for entry in stage["log"]]
    control = {entry["step"]: entry["kl"] for entry in control if "kl" in entry}
    last = cut["log"][-5:]
    ours, theirs = fmean(entry["kl"] for entry in last), fmean(control[entry["step"]] for entry in last)
    assert (
        f"after {cut['steps']:,} of its {cut['max_steps']:,} steps. Its training KL was {ours:.3f}"
        in RESULTS.read_text()
    )
    assert f"fitted memories alone have [{theirs:.3f}](" in RESULTS.read_text() and 0.79 < ours / theirs < 0.81


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        ("memories log-spaced from 8 to 512", "default"),
        ("memories of the teacher's distances", "decays"),
        ("a norm on B and C", "norm"),
        ("turning states |", "rotary"),
        ("frozen taps", "frozen taps"),
        ("random taps", "random taps"),
        ("the rest at a tenth", "tenth"),
        ("the rest at a third", "third"),
        ("memories and delays fitted |", "fitted"),
        ("memories and delays fitted, the rest", "fitted, tenth"),
        ("turning states, fitted |", "rotary, fitted"),
        ("memories and delays fitted, batches half", "fitted, half batches"),
        ("memories and delays fitted, batches a quarter", "fitted, quarter batches"),
        ("turning states, fitted, the rest at a tenth |", "rotary, fitted, tenth"),
        ("turning states, fitted, the rest at a tenth, batches", "rotary, fitted, tenth, quarter batches"),
        ("turning states, memories of the", "rotary, decays"),
        ("turning states, the rest", "rotary, tenth"),
        ("turning states, memories of distances", "rotary, decays, tenth"),
        ("turning states, memories from", "rotary, long"),
    ],
)
def test_questions(start, kind):
    report, shown = result("quality/questions/questions_cpu.json"), []
    places = [("small_lm", [f"{text}: KL" for text in (TEXTS[0], TEXTS[2])])]
    places += [("toy", [f"gap {gap}" for gap in (1, 8, 24)])]
    for name, titles in places:
        part = report[name]
        runs = part["runs"].get(kind)
        if runs is None:
            shown += [""] * len(titles)
            continue
        rates = {rate: runs[f"{rate:g}, seed 0"]["training_kl"][-1] for rate in part["rates"]}
        best = min(rates, key=rates.get)
        assert part["chosen"][kind] == best
        seeds = [runs[key]["after"] for key in (f"{best:g}, seed {seed}" for seed in (0, 1)) if key in runs]
        for title in titles:
            values = [one[title] for one in seeds]
            digits = 4 if name == "small_lm" else 2
            spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
            shown.append(f"{sum(values) / len(values):.{digits}f}{spread}")
    assert row(RESULTS, f"question: {start}") == shown


def test_sizes_of_a_student_and_its_teacher():
    report = result("quality/smollm2_transfer/report_h200.json")
    by_default = result("speed/results/two_gpus_h200.json")
    student, teacher = (round(by_default[f"{model}_parameters"] / 1e6) for model in ("student", "teacher"))
    assert f"`lm_default`'s has {student}M for {teacher}M" in README.read_text()
    small = round(report["student_parameters"] / 1e6)
    assert f"{small}M parameters with a state of 64" in RESULTS.read_text()
    assert f"{student}M with 128" in RESULTS.read_text()
    assert (
        f"{report['after']['speeches']['perplexity_ratio']:.2f} times the teacher's perplexity" in README.read_text()
    )
    assert all(gap["student"]["recall"] == 0.0 for gap in report["after"]["speeches"]["recall"].values())

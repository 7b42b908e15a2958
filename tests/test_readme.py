"""The README says nothing that no committed result or file shows."""

import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TEXTS = ("speeches", "python docs", "brown (out of domain)")


def result(path: str) -> dict:
    return json.loads((ROOT / "benchmarks" / path).read_text())


def row(start: str) -> list[str]:
    """The cells of the README's table row whose first cell starts so."""
    lines = [line for line in README.splitlines() if line.startswith(f"| {start}")]
    assert len(lines) == 1, (start, lines)
    return [cell.strip() for cell in lines[0].strip("|").split("|")][1:]


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) >= 6
    for link in links:
        assert (ROOT / link).exists(), link


def test_commands_exist():
    targets = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)
    for recipe in re.findall(r"training_args/\w+\.yaml", README):
        assert (ROOT / recipe).is_file(), recipe
    for name in re.findall(r"`(\w+_lm|smollm2_\w+)`", README):
        assert (ROOT / f"training_args/{name}.yaml").is_file(), name


def test_figures_of_the_demo():
    report = result("quality/quickstart_lm/report_cpu.json")
    (before,), (after,) = report["before"].values(), report["after"].values()
    for start, numbers in (("student, weights copied", before), ("student, distilled", after)):
        shown = [f"{numbers['student_perplexity']:.1f}", f"{numbers['kl']:.2f}", f"{numbers['agreement']:.2f}"]
        assert row(start) == shown
    assert row("teacher, SmolLM2-135M") == [f"{after['teacher_perplexity']:.1f}", "", ""]
    assert f"{after['n_tokens']:,} tokens" in README and f"{report['seconds'] / 60:.1f} minutes" in README
    slow = result("quality/quickstart_lm/report_float32_cpu.json")
    (after,) = slow["after"].values()
    shown = f"a perplexity of {after['student_perplexity']:.1f} and a KL of {after['kl']:.2f} after"
    assert f"{shown} {slow['seconds'] / 60:.1f} minutes" in README


TOKENS = ("5M tokens", "20M tokens", "60M tokens")
DEFAULT = "text, samples and continuations, state of 128"


def over_tokens(measure: str, method: str = DEFAULT) -> list[float | None]:
    cells = result("quality/smollm2_long/table.json")["measures"][measure][method]
    return [cells[tokens]["mean"] if tokens in cells else None for tokens in TOKENS]


@pytest.mark.parametrize(
    ("start", "text"),
    [("speeches", "speeches"), ("Python documentation", "python docs"), ("Brown corpus", "brown (out of domain)")],
)
def test_figures_of_the_language_default(start, text):
    pairs = zip(over_tokens(f"{text}: KL"), over_tokens(f"{text}: ppl ratio"))
    assert row(start) == [f"{kl:.2f} / {ratio:.2f}" for kl, ratio in pairs]
    run = result("quality/smollm2_long/runs/text-samples-and-continuations-state-of-128__60m-tokens__seed0.json")
    assert f"{run['after'][text]['n_tokens']:,} held-out tokens" in README
    cells = result("quality/smollm2_long/table.json")["measures"][f"{text}: KL"][DEFAULT]
    assert [cells[tokens]["n"] for tokens in TOKENS] == [2, 1, 2]
    assert "means of two seeds at 5M and 60M, one at 20M" in README


@pytest.mark.parametrize("gap", [16, 64, 256])
def test_figures_of_copying(gap):
    teacher = over_tokens(f"copying, gap {gap}, teacher")[-1]
    shown = [f"{recall:.2f}" for recall in over_tokens(f"copying, gap {gap}")]
    assert row(f"random tokens copied over a gap of {gap}, teacher {teacher:.2f}") == shown


def test_what_the_parts_of_the_language_default_bring():
    methods = ("text without repeats", "text", "text and samples", "text and samples, state of 128", DEFAULT)

    def at(tokens: str, measure: str) -> list[float | None]:
        return [over_tokens(measure, method)[TOKENS.index(tokens)] for method in methods]

    brown, copying = (at("20M tokens", measure) for measure in ("brown (out of domain): KL", "copying, gap 64"))
    starts = ("text alone", "and repeats in a quarter", "and 4M tokens", "and a state of 128", "and 8M tokens")
    for start, *values in zip(starts, at("20M tokens", "speeches: KL"), brown, copying, strict=True):
        assert row(start) == [f"{value:.2f}" for value in values]
    counts = [result("quality/smollm2_long/table.json")["measures"]["speeches: KL"][name] for name in methods]
    assert [cells["20M tokens"]["n"] for cells in counts] == [1, 2, 1, 1, 1] and counts[3]["60M tokens"]["n"] == 1
    assert "random tokens copied (one seed each, two of text with repeats):" in README
    assert [max(over_tokens(f"copying, gap {gap}", methods[0])[1] for gap in (16, 64, 256, 1024))] == [0.0]
    speeches = at("20M tokens", "speeches: KL")
    shown = f"{speeches[1] - speeches[0]:.2f} of KL on speeches and {brown[1] - brown[0]:.2f} on Brown, which the"
    assert f"Without repeats nothing is copied over any gap; they cost {shown}" in README
    assert brown[2] < brown[0]  # "gives back there"
    for shown, measure, digits in (
        ("KL on documentation from {} to {}", "python docs: KL", 3),
        ("copying over a gap of 64 from {} to {}, of 256", "copying, gap 64", 2),
        ("of 256 from {} to {}", "copying, gap 256", 2),
    ):
        assert shown.format(*(f"{value:.{digits}f}" for value in at("60M tokens", measure)[3:])) in README
    *_, before, after = at("60M tokens", "speeches: KL")
    assert f"and costs {after - before:.3f} on speeches (one seed without it, two with it;" in README
    assert max(over_tokens("copying, gap 1024")) < 0.001
    assert f"(teacher {over_tokens('copying, gap 1024, teacher')[0]:.2f})" in README


def test_the_bars_of_the_language_default():
    at_60m = {measure: over_tokens(measure)[-1] for measure in result("quality/smollm2_long/table.json")["measures"]}
    assert max(at_60m[f"{text}: KL"] for text in ("speeches", "python docs")) <= 0.25
    assert at_60m["brown (out of domain): KL"] <= 0.45 and at_60m["brown (out of domain): ppl ratio"] <= 1.35
    assert at_60m["copying, gap 64"] >= 0.5 * at_60m["copying, gap 64, teacher"]


def test_what_perplexity_hides():
    speeches = result("quality/smollm2_transfer/report_h200.json")["after"]["speeches"]
    assert f"{speeches['perplexity_ratio']:.2f} times the teacher's perplexity on speeches" in README
    assert all(gap["student"]["recall"] == 0.0 for gap in speeches["recall"].values())


@pytest.mark.parametrize(
    ("start", "method"),
    [
        ("training from scratch", "from scratch"),
        ("soft KD, same", "soft KD"),
        ("CAB, same", "CAB"),
        ("weight reuse", "weight reuse"),
        ("**outputs", "outputs, then KL"),
    ],
)
@pytest.mark.parametrize(("grid", "prefix"), [("cifar10", ""), ("digits", "digits: ")])
def test_figures_of_the_image_grids(grid, prefix, start, method):
    measures = result(f"quality/{grid}/table.json")["measures"]
    shares = ("1 %", "5 %", "10 %", "20 %", "100 %")[grid == "digits" :]
    assert row(prefix + (start.strip("*") if prefix else start)) == [
        f"{top1(measures['top1'][method][share], grid)} / {measures['kl'][method][share]['mean']:.2f}"
        for share in shares
    ]


def top1(cell: dict, grid: str) -> str:
    return f"{cell['mean']:.3f}" + (f" ± {cell['std']:.3f}" if grid == "cifar10" else "")


def test_seeds_of_the_image_grids():
    measures = result("quality/cifar10/table.json")["measures"]["top1"]
    rows = ("from scratch", "soft KD", "CAB", "weight reuse", "outputs, then KL")
    counts = {cell["n"] for name in rows for cell in measures[name].values()}
    assert counts == {3} and sum(len(measures[name]) for name in rows) == 25
    assert "1,500 steps of 128 images each; three seeds)" in README
    rates = [name for name in measures if name.endswith(("e-2", "e-3", "e-4"))]
    single = [cells["10 %"]["n"] for name, cells in measures.items() if name not in (*rows, *rates)]
    assert single == [3] * 12
    assert "(three seeds of the five rows above and of twelve single choices at 10 %, rates apart)" in README
    digits = result("quality/digits/table.json")["measures"]["top1"]
    assert {cell["n"] for cells in digits.values() for cell in cells.values()} == {3}


def test_what_is_said_of_learning_rates():
    cells = {name: cell["10 %"] for name, cell in result("quality/cifar10/table.json")["measures"]["top1"].items()}
    rates = [", 3e-4", "", ", 3e-3"]
    means = {name: [cells[name + rate]["mean"] for rate in rates] for name in ("from scratch", "soft KD", "CAB")}
    assert {cells[name + rate]["n"] for name in ("soft KD", "CAB") for rate in rates} == {3}
    assert all(max(means[name]) == means[name][1] for name in ("from scratch", "soft KD"))
    leads = "{:.3f} for {:.3f} at 3e-4, {:.3f} for {:.3f} at 1e-3, {:.3f} for {:.3f} at 3e-3"
    pairs = zip(means["CAB"], means["soft KD"], strict=True)
    assert (
        f"three seeds each, the lead grows with the rate: {leads.format(*(mean for two in pairs for mean in two))}."
        in README
    )
    assert (
        f"({means['from scratch'][2]:.3f} at 3e-3), not CAB, which ends at {cells['CAB, 1e-2']['mean']:.3f} at 1e-2"
        in README
    )
    lead = max(*means["CAB"], cells["CAB, 1e-2"]["mean"]) - max(means["soft KD"])
    assert f"each at its best rate, CAB leads soft KD by {100 * lead:.0f} points" in README


def test_what_is_said_of_cifar10():
    top1 = {
        name: {share: cell["mean"] for share, cell in cells.items()}
        for name, cells in result("quality/cifar10/table.json")["measures"]["top1"].items()
    }
    leads = [round(100 * (top1["CAB"][share] - top1["soft KD"][share])) for share in top1["soft KD"]]
    assert len(leads) == 5 and f"CAB leads soft KD by {min(leads)} to {max(leads)} points at every share" in README
    for share, shown in top1["weight reuse"].items():  # the bars of the vision half
        others = max(top1["soft KD"][share], shown)
        assert top1["outputs, then KL"][share] > top1["CAB"][share] > others
    runs = [result(f"quality/cifar10/runs/outputs-then-kl__1-pct__seed{seed}.json") for seed in range(3)]
    for run in runs:
        assert [stage["steps"] for stage in run["curve"]] == [450, 1050]
        assert not any("ce" in entry for stage in run["curve"] for entry in stage["log"])  # no label is read
    tests = [after for run in runs for after in run["after"].values()]
    behind = [100 * (after["teacher_top1"] - after["student_top1"]) for after in tests]
    assert f"within {sum(behind) / len(behind):.1f} points of a teacher that knows the task" in README
    for after in tests:
        assert f"to a top-1 of {after['teacher_top1']:.3f}" in README
        assert f"{after['n_images']:,} test images" in README
    shown = (
        "takes weight reuse from {} to {}, MOHAWK's maps and hidden states without the fit to {}, the bridge without "
        "the fit to {}, fit and outputs to {}"
    )
    names = ("weight reuse", "fitted weights", "MOHAWK", "weight reuse, CAB", "outputs, then KL")
    assert shown.format(*(f"{top1[name]['10 %']:.3f}" for name in names)) in README
    assert "SSD mixers and a rate of 5e-5" in README and "(lower still at 1.5e-4 and at [5e-4]" in README
    assert top1["weight reuse, 1.5e-4"]["10 %"] < top1["weight reuse"]["10 %"] < top1["soft KD"]["10 %"]
    assert f"around random mixers ({top1['weight reuse, random mixers']['10 %']:.3f} at 10 %)" in README
    for run in result("quality/cifar10/weights_5e-4_h200.json")["runs"]:
        if run["method"] == "weight reuse":
            assert run["after"]["top1"] < top1["weight reuse"][run["data"]]
            assert run["options"]["learning_rate"] == 10 * 5e-5


def test_what_is_said_of_the_digits():
    measures = result("quality/digits/table.json")["measures"]
    top1, kl = (
        {name: {share: cell["mean"] for share, cell in cells.items()} for name, cells in measures[one].items()}
        for one in ("top1", "kl")
    )

    def lead(measure: str, share: str) -> float:
        """CAB's over soft KD in standard errors, seed beside seed."""
        ours, theirs = (measures[measure][name][share]["seeds"] for name in ("CAB", "soft KD"))
        leads = [one - other for one, other in zip(ours, theirs, strict=True)]
        return mean(leads) / (stdev(leads) / len(leads) ** 0.5)

    for share in ("5 %", "10 %", "20 %", "100 %"):
        assert abs(lead("top1", share)) < 2
        assert (lead("kl", share) < -2) == (share == "5 %")
        assert min(kl, key=lambda name: kl[name].get(share, 9)) == "outputs, then KL"
        if share != "100 %":
            assert max(top1, key=lambda name: top1[name].get(share, 0)) == "outputs, then KL"
    assert len(top1) == 11


def test_figures_of_the_small_language_model():
    kl = {
        name: cells["2M tokens"]["mean"]
        for name, cells in result("quality/small_lm/table.json")["measures"]["speeches: KL"].items()
    }
    assert kl.pop("the teacher itself, labels") < min(kl.values())  # no student, but the control of adaptation
    assert len(kl) == 21 and "Among [21 methods" in README
    assert sorted(kl, key=kl.get)[:2] == ["outputs, then KL and bridge", "outputs, then KL"]
    for shown, name in (
        ("a KL of {} on held-out text", "outputs, then KL"),
        ("a KL of {} on held-out text, with a bridge beside its KL", "outputs, then KL and bridge"),
        ("against {} by KL alone", "fitted weights, KL"),
        ("{} for MOHAWK", "MOHAWK"),
        ("{} with the bridge, as the paper starts it, in place of outputs", "CAB on the same start"),
        ("{} for a student from scratch", "from scratch, KL"),
        ("{} as the paper starts it and", "random mixers, CAB"),
        ("and {} centered, against", "random mixers, CAB centered"),
        ("against {} by KL alone.", "random mixers, KL"),
    ):
        assert shown.format(f"{kl[name]:.3f}") in README, name


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
def test_figures_of_the_language_methods(start, method):
    measures = result("quality/smollm2/table.json")["measures"]
    cells = [measures[f"{text}: KL"][method]["5M tokens"] for text in TEXTS]
    assert row(start) == [f"{cell['mean']:.2f}" + f" ± {cell['std'] or 0:.2f}" * (cell["n"] > 2) for cell in cells]


def test_what_is_said_of_the_language_methods():
    measures = result("quality/smollm2/table.json")["measures"]
    kl = {name: cells["5M tokens"]["mean"] for name, cells in measures["speeches: KL"].items()}
    assert len(kl) == 28 and "[all 28]" in README
    half = kl["half as deep, KL and bridge"], kl["half as deep, KL"]
    assert "{:.2f} with it, {:.2f} without".format(*half) in README
    scratch = [kl[f"from scratch, {losses}"] for losses in ("KL and bridge", "KL", "KL, 4e-4", "KL and bridge, 4e-4")]
    more = [
        measures["speeches: KL"][f"from scratch, {losses}"]["20M tokens"]["mean"] for losses in ("KL and bridge", "KL")
    ]
    shown = "({:.2f} with it, {:.2f} without, {:.2f} both at a third of the rate; at 20M tokens {:.2f} and {:.2f})"
    assert shown.format(*scratch[:3], *more) in README
    assert f"in a stage of its own it costs there ({kl['from scratch, CAB']:.2f})" in README
    for start, name in (("half as many layers", "half as deep, KL"), ("Mamba-2 from scratch", "from scratch, KL")):
        cells = measures["speeches: KL"][name]
        shown = ", ".join(f"{cells[tokens]['mean']:.2f}" for tokens in TOKENS)
        assert f"{start} {shown}" in README
        assert all(cells["mean"] == 0.0 for cells in measures["copying, gap 16"][name].values())
    assert f"{scratch[2]:.2f}" == f"{scratch[3]:.2f}"
    control = [measures[f"{text}: KL"]["the teacher itself, labels"]["5M tokens"]["mean"] for text in TEXTS]
    ratio = measures["speeches: ppl ratio"]["the teacher itself, labels"]["5M tokens"]["mean"]
    assert "ends at {:.2f}, {:.2f} and {:.2f} from itself at {:.2f} times".format(*control, ratio) in README
    assert control[0] > kl["outputs, then KL"] == min(kl.values())  # "further than the best student is"


def test_what_is_said_of_random_mixers():
    cells = {
        name: cell["5M tokens"]
        for name, cell in result("quality/smollm2/table.json")["measures"]["speeches: KL"].items()
    }
    many = {"CAB", "CAB, not centered", "random mixers, KL and bridge"}
    many |= {f"random mixers, KL{more}" for more in ("", ", longer warm-up", ", 4e-4")}
    many |= {"weight reuse, KL", "weight reuse, not fitted, KL", "MOHAWK"}
    counts = dict.fromkeys(many, 4) | dict.fromkeys(("outputs, then KL", "random mixers, outputs, then KL"), 2)
    assert {name: cell["n"] for name, cell in cells.items()} == {name: counts.get(name, 1) for name in cells}
    assert "one seed, two for the first row and for random mixers behind mixer outputs, four where a" in README
    assert "(one seed of most methods, two of two, four of nine, 5M tokens" in README

    def seeds(name: str) -> list[str]:
        return [f"{kl:.2f}" for kl in sorted(cells[name]["seeds"])]

    def ends(name: str) -> str:
        return "{} to {}".format(*seeds(name)[:: len(seeds(name)) - 1])

    alone = seeds("random mixers, KL"), seeds("random mixers, KL, longer warm-up")
    for shown in (
        f"all four seeds end at {ends('CAB')}",
        "KL alone ends at {}, {}, {} and {} on speeches".format(*alone[0]),
        "behind four times the warm-up at {}, {}, {} and {}: three of eight low".format(*alone[1]),
        f"learning rate ends at {ends('random mixers, KL, 4e-4')}, mixer outputs",
        "in the bridge's place at {} and {}".format(*seeds("random mixers, outputs, then KL")),
        f"as the paper starts it at {ends('CAB, not centered')}",
        f"beside the KL at {ends('random mixers, KL and bridge')}",
        f"and anywhere from {ends('random mixers, KL')} without (four seeds each, below)",
    ):
        assert shown in README
    copied = sorted(kl for name in ("weight reuse, KL", "weight reuse, not fitted, KL") for kl in cells[name]["seeds"])
    assert f"not fitted end high in all eight seeds, {copied[0]:.2f} to {copied[7]:.2f}, and MOHAWK's" in README
    assert f"more in 5M tokens than they give ({ends('MOHAWK')})" in README
    below = [float(kl) < cells["CAB"]["mean"] for kls in alone for kl in kls]
    assert sum(below) == 3 and len(below) == 8
    means = ("{mean:.2f} ± {std:.2f}".format(**cells[name]) for name in ("CAB", "CAB, not centered"))
    assert "at a KL of {} behind a centered bridge, of {} behind the paper's".format(*means) in README


def test_figures_of_sampled_text():
    measures = result("quality/samples/table.json")["measures"]
    for start, method in (
        ("1 % of the training text", "1 % of the text"),
        ("1 % of it, and", "1 %, and samples that continue it"),
        ("1M tokens that the teacher", "samples from nothing alone"),
        ("all of the training text", "all of the text"),
    ):
        cells = [measures[f"{text}: KL"][method]["2M tokens"] for text in ("speeches", "brown (out of domain)")]
        assert row(start) == [f"{cell['mean']:.3f}" for cell in cells] and {cell["n"] for cell in cells} == {2}


def test_figures_of_quickstart_vision():
    report = result("quality/quickstart_vision/results_cpu.json")
    for name, shown in (("from scratch", "from scratch"), ("soft KD", "soft KD"), ("CAB", "CAB")):
        assert f"{shown} {report['summary'][name]['student_top1_mean']:.3f}" in README
    assert f"of a teacher's {report['teacher_top1']:.3f}" in README and len(report["seeds"]) == 5
    cab = report["summary"]["CAB"]
    lead, error = (100 * cab[f"top1_over_soft KD_{kind}"] for kind in ("mean", "standard_error"))
    assert f"{lead:.1f} points with a standard error of {error:.1f}: it is ahead in two seeds, level in one" in README
    images = [
        round(report["n_test_images"] * (seed["CAB"]["student_top1"] - seed["soft KD"]["student_top1"]))
        for seed in report["seeds"].values()
    ]
    assert images[0] == 0 and sorted(images)[:2] == [-2, -1] and min(sorted(images)[3:]) > 0


def test_figures_of_cifar10():
    steps = result("speed/results/image_step_h200.json")["results"]
    added = steps["mamba kd + bridge"]["milliseconds"] / steps["mamba kd"]["milliseconds"] - 1
    assert f"before it had a kernel, added {100 * added:.0f} % time to its step" in README
    report = result("quality/cifar10/vim_tiny_h200.json")["student"]
    log = report["stages"][0]["log"]
    assert report["stages"][0]["steps"] == 2000 and all(value == value for entry in log for value in entry.values())
    runs = result("quality/cifar10/weights_5e-4_h200.json")["runs"]
    assert len(runs) == 6 and {run["options"]["learning_rate"] for run in runs} == {5e-4}
    fitted = {run["data"]: run["after"]["top1"] for run in runs if run["method"] == "outputs, then KL"}
    shown = "ends at a top-1 of {:.3f}, {:.3f} and {:.3f} with 1, 10 and 100 % of the images"
    assert shown.format(*(fitted[share] for share in ("1 %", "10 %", "100 %"))) in README


def test_figures_of_the_bridges_start():
    shares = result("quality/bridge_start/constant_share_cpu.json")
    for teacher, shown in (
        ("smollm2-135m", "SmolLM2-135M {} to {} %"),
        ("cifar10_dinov2_small", "DINOv2-S {} to {} %"),
    ):
        keys = [f"{100 * share:.0f}" for share in shares[teacher]["key"]["constant_share"]]
        assert shown.format(min(keys, key=int), max(keys, key=int)) in README
    assert max(shares["digits_vit"]["key"]["constant_share"]) < 0.2
    table = result("quality/cifar10/table.json")["measures"]["top1"]
    paper, kd, here = (table[name]["10 %"]["mean"] for name in ("CAB, not centered", "soft KD", "CAB"))
    assert f"takes soft KD's {kd:.3f} at 10 % of the images down to {paper:.3f}. Started" in README
    assert f"(`bridge_centered`, the default), it takes them up to {here:.3f}" in README
    shown = (
        "of the identity changes nothing ({}; under soft KD {}), nor does a relative loss ({}); ending the bridge at"
    )
    names = ("CAB, usual A", "soft KD, usual A", "CAB, relative loss")
    assert shown.format(*(f"{table[name]['10 %']['mean']:.3f}" for name in names)) in README
    ended = {f"{table['CAB, bridge ends'][share]['mean']:.3f}" for share in ("10 %", "100 %")}
    assert len(ended) == 1 and f"costs ({ended.pop()}, and as much with all images)" in README
    assert f"leaves nothing behind ({table['CAB, bridge first']['10 %']['mean']:.3f}; three seeds each)" in README
    ends = [
        result(f"quality/{grid}/table.json")["measures"]["top1"]["CAB"]["10 %"]["mean"]
        for grid in ("digits", "digits_questions")  # the second was run with the paper's start
    ]
    assert result("quality/digits_questions/runs/cab__10-pct__seed0.json")["options"]["bridge_centered"] is False
    assert f"both starts end at a top-1 of {ends[0]:.3f}" in README and f"{ends[1]:.3f}" == f"{ends[0]:.3f}"


def test_figures_of_decoding():
    cells = {(c["model"], c["context"]): c for c in result("speed/results/decode_cpu.json")["cells"]}
    for start, model in (("Transformer teacher", "teacher"), ("Mamba student", "student")):
        shown = [f"{cells[model, context]['ms']:.0f}" for context in (1024, 4096, 32768)]
        assert row(start) == [*shown, f"{cells[model, 32768]['cache_mib']:,.0f} MiB"]


def test_figures_of_decoding_on_a_gpu():
    cells = [cell for cell in result("speed/results/decode_h200.json")["cells"] if cell["batch_size"] == 16]
    for model in ("teacher", "student"):
        times = [cell["ms"] for cell in cells if cell["model"] == model]
        assert f"the {model} {min(times):.0f} to {max(times):.0f} ms" in README
    longest = {cell["model"]: cell["cache_mib"] for cell in cells if cell["context"] == 32768}
    assert f"cache holds {longest['teacher']:,.0f} MiB, the student's state {longest['student']:.0f}" in README


@pytest.mark.parametrize(
    ("start", "name"),
    [
        ("the released training loop", "released, float32, script"),
        ("the released model", "released, bfloat16, bare"),
        ("ours under the Trainer, float32", "ours, float32, cuda graph"),
        ("ours under the Trainer, bfloat16", "ours, bfloat16, cuda graph"),
    ],
)
def test_figures_of_the_released_code(start, name):
    results = result("speed/results/released_step_h200.json")["results"]
    assert row(start) == [f"{results[name]['images_per_second']:.0f}"]
    gradients = results["released, gradients of its bridge loss"]
    assert gradients["student"] == 0.0 and gradients["aligner"] > 0.0 and "no gradient (0.0 on that GPU" in README


def test_figures_of_the_alignment():
    cells = {(c["method"], c["tokens"]): c for c in result("speed/results/alignment_cpu.json")["cells"]}
    for method in ("bridge", "matrix"):
        cell = cells[method, 4096]
        assert f"{cell['ms']:,.0f} ms and {cell['peak_mib']:,.0f} MiB" in README
    cells = {(c["method"], c["tokens"]): c for c in result("speed/results/alignment_h200.json")["cells"]}
    bridge = [cell for (method, _), cell in cells.items() if method == "bridge"]
    times, memory = ([cell[key] for cell in bridge] for key in ("ms", "peak_mib"))
    assert f"the bridge takes {min(times):.0f} to {max(times):.0f} ms from 512 tokens to 16,384" in README
    assert f"memory grows from {memory[0]:.0f} to {memory[-1]:.0f} MiB" in README
    few, many = cells["matrix", 512], cells["matrix", 16384]
    shown = f"take {few['ms']:.0f} ms at 512 tokens, and {many['ms']:.0f} ms and {many['peak_mib']:,.0f} MiB at 16,384"
    assert shown in README


def test_figures_of_the_toy():
    students = result("quality/recall/toy_cpu.json")["students"]
    shown = "from {:.2f}, {:.2f} and {:.2f} to {:.2f}, {:.2f} and {:.2f} ([result]"
    recalls = (students[f"{text}, fitted weights"]["recall"].values() for text in ("random tokens", "repeats"))
    assert "over gaps of 1, 8 and 24 tokens " + shown.format(*(recall for one in recalls for recall in one)) in README


def test_sizes_of_a_student_and_its_teacher():
    report = result("quality/smollm2_transfer/report_h200.json")
    millions = [round(report[f"{model}_parameters"] / 1e6) for model in ("student", "teacher")]
    assert f"{millions[0]}M parameters with a state of 64 ([report]" in README
    assert f"the teacher {millions[1]}M" in README


def test_figures_of_the_starts():
    results = result("quality/starts/starts_cpu.json")["results"]
    assert {f"{one['n_tokens']:,}" for one in results.values()} == {"2,555"} and "2,555 held-out tokens)" in README
    start = "copied, transparent, moving averages"
    for name in (f"{start}; RMS", f"{start}; output projections fitted on 4,096 tokens"):
        assert re.search(rf"\b{results[name]['student_perplexity']:,.0f}\b", README)


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
def test_figures_of_speed(start, file, name):
    measured = result(f"speed/results/{file}")["results"]["32x512"][name]
    memory = f"{measured['peak_gib']:.1f} GiB" if "peak_gib" in measured else ""
    assert row(start) == [f"{measured['tokens_per_second'] / 1e3:.0f} k", memory]


def test_chunks_of_logits_are_compared_in_one_run():
    older = result("speed/results/distillation_step_h200.json")["results"]["32x512"]["kd, cuda graph"]
    assert f"older state of the code that a graph took to {older['tokens_per_second'] / 1e3:.0f} k" in README
    chunks = result("speed/results/distillation_step_h200_logits.json")["results"]["32x512"]["kd, cuda graph"]
    assert f"(another run, {chunks['tokens_per_second'] / 1e3:.0f} k with chunks there)" in README


def added_by_the_bridge(file: str, step: str) -> list[float]:
    """Per cent of time and of memory."""
    results = result(f"speed/results/distillation_step_h200_{file}.json")["results"]["32x512"]
    with_it, without = (results[f"{name}, {step}"] for name in ("kd + bridge", "kd"))
    return [100 * (with_it[key] / without[key] - 1) for key in ("milliseconds", "peak_gib")]


def test_what_the_bridge_costs():
    for file, step, shown in (
        ("kernel", "cuda graph", "The bridge adds {:.1f} % time and {:.1f} % memory to a step with a CUDA graph"),
        ("kernel", "torch.compile, cuda graph", "and {:.1f} % and {:.1f} % to a compiled one"),
        ("kernel_again", "torch.compile, cuda graph", "kernel_again.json): {:.1f} % and {:.1f} %)"),
    ):
        assert shown.format(*added_by_the_bridge(file, step)) in README


def test_figures_of_the_scans():
    cells = {
        (c["case"], c["variant"]): c["forward_backward_ms"] for c in result("speed/results/ssm_ops_cpu.json")["cells"]
    }
    for key in (("s6", "torch"), ("s6", "transformers"), ("ssd", "torch"), ("ssd", "transformers_64")):
        assert f" {cells[key]:,.0f} ms" in README, key
    assert cells["ssd", "transformers_64"] < cells["ssd", "transformers_256"]

"""The command `cab-hf`: from a teacher to a student, and what can be done with it.

A subcommand is two functions: one adds its options to a parser, the other runs it. `COMMANDS` names them. The line is
read before torch is imported, so that help and a mistyped word take no seconds: whatever needs it is imported where it
is used.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from cab_hf.checks import (
    check_options,
    check_source,
    end,
    find_recipe,
    interrupts_in_one_line,
    parse_count,
    quiet_bars,
)


class Command:
    """A subcommand.

    Args:
        help: one line of what it does.
        add_options: adds its arguments to its parser.
        run: runs it with the parsed arguments.
        check: refuses arguments, without an import of torch. It has all options of a recipe, too: they are found in
            `recipe_options`.
    """

    def __init__(
        self,
        help: str,
        add_options: Callable[[argparse.ArgumentParser], None],
        run: Callable[[argparse.Namespace], None],
        check: Callable[[argparse.Namespace], None] | None = None,
    ) -> None:
        self.help, self.add_options, self.run, self.check = help, add_options, run, check


def _distil_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", metavar="TEACHER", help="Hub id or folder of a Transformer, or smollm2-demo")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="D",
        help="texts: files, folders, globs or Hub ids, builtin for Python's language reference; or images: a folder "
        "with one subfolder per class, a saved data set, digits or a Hub id. A part is held out by itself",
    )
    data.add_argument("--tokens", metavar="N", help="tokens to train on, such as 20M (default: the recipe's)")
    data.add_argument("--images", metavar="N", help="images to train on (default: 192k, on a CPU 6,400)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--recipe",
        metavar="R",
        help="a recipe's file, or the name of a shipped one (default: lm_default, on a CPU quickstart_lm; for images "
        "vision_default)",
    )
    how.add_argument("--output_dir", metavar="DIR", help="where the student goes (default: outputs/TEACHER-mamba)")
    how.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs, one process each (default: 1)")
    how.add_argument("--dry_run", action="store_true", help="say what would happen, in seconds, and stop")
    how.add_argument("--push_to_hub", metavar="BOOL", help="publish the student with its card (default: false)")
    parser.add_argument("--help-all", action="store_true", help="all options of a recipe, which can be given here too")


DISTIL_OPTIONS = ("data", "tokens", "images", "recipe", "output_dir", "gpus", "dry_run", "push_to_hub")


def _check_distil(arguments: argparse.Namespace) -> None:
    check_options(arguments.recipe_options, DISTIL_OPTIONS)
    if arguments.tokens and arguments.images:
        raise ValueError(f"`--tokens` is {arguments.tokens} and `--images` {arguments.images}. Give one of them.")
    amount = arguments.tokens or arguments.images
    arguments.amount = None if amount is None else parse_count(amount)
    if arguments.recipe is not None:
        find_recipe(arguments.recipe)
    for source in arguments.data:
        check_source("data", source, "dataset")


def _distil(arguments: argparse.Namespace) -> None:
    from accelerate import PartialState

    from cab_hf.recipes import build_recipe, parse_options
    from cab_hf.runs.distill import check_gpus, launch, recipe_values
    from cab_hf.runs.plan import caches, plan
    from cab_hf.runs.run import run_recipe
    from cab_hf.runs.stages import tell

    launches = arguments.gpus > 1
    if launches:
        check_gpus(arguments.gpus)
    if launches or os.environ.get("RANK", "0") != "0":
        for name in ("cab_hf", "transformers"):
            logging.getLogger(name).setLevel(logging.ERROR)  # the first process warns
    options = parse_options(arguments.recipe_options)
    for name in ("output_dir", "push_to_hub"):
        if getattr(arguments, name) is not None:
            options |= parse_options([f"--{name}", getattr(arguments, name)])
    values = recipe_values(
        arguments.teacher,
        arguments.data,
        recipe=arguments.recipe,
        amount=arguments.amount,
        options=options,
        processes=arguments.gpus if launches else None,
    )
    if launches:
        gpus = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        gpus.add_argument("--gpus")
        raise SystemExit(launch(arguments.gpus, gpus.parse_known_args(arguments.given)[1]))
    recipe = build_recipe(values)
    if arguments.dry_run:
        tell(recipe, plan(recipe))
    else:
        tell(recipe, f"output: {recipe.output_dir}; caches: {caches(recipe)}")
        run_recipe(recipe)
    PartialState().destroy_process_group()


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a saved student, or its Hub id")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--to",
        choices=("stock", "gguf", "onnx"),
        default="stock",
        help="stock: a Mamba, Mamba-2 or GraniteMoeHybrid, which vLLM serves (default); gguf: OUT/model.gguf "
        "for llama.cpp; onnx: OUT/model.onnx, for scoring texts of one length (it keeps no state)",
    )
    parser.add_argument(
        "--compact",
        action="store_true",
        help="keep the width of the states where the student has no activation after its convolution: smaller and "
        "faster, logits differ by about 1e-4 of their size (stock, gguf)",
    )
    parser.add_argument("--tokens", type=int, default=128, help="length of texts (onnx; default: 128)")
    parser.add_argument(
        "--kind", choices=("f32", "f16", "q8_0", "q4_0"), default="f32", help="of large matrices (gguf; default: f32)"
    )


def _export(arguments: argparse.Namespace) -> None:
    from cab_hf.export.onnx import export_onnx
    from cab_hf.export.stock import export_stock

    if arguments.to == "onnx":
        path = export_onnx(arguments.folder, arguments.out, tokens=arguments.tokens)
        print(f"{path}: for scoring. It reads its whole input at once and keeps no state between calls.")
        return
    if arguments.to == "gguf":
        from cab_hf.export.gguf import export_gguf

        print(export_gguf(arguments.folder, arguments.out, compact=arguments.compact, kind=arguments.kind))
        return
    model = export_stock(arguments.folder, arguments.out, compact=arguments.compact)
    print(f"{arguments.out}: {type(model).__name__}, {model.num_parameters():,} parameters.")
    print(f'Load it with AutoModelForCausalLM.from_pretrained("{arguments.out}").')


def _check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("export", metavar="FOLDER", help="an export, as `cab-hf export` wrote it")
    parser.add_argument("--student", help="its student, to compare on --data (default: the texts of its export)")
    parser.add_argument("--data", default="builtin", help="texts: builtin, a file, folder, glob or Hub id")
    parser.add_argument(
        "--python",
        nargs="*",
        default=[],
        metavar="PATH",
        help="bin/python of other environments to ask, too: one with vLLM, or with another transformers",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest mean difference of log-probabilities, in nats (default: 0.02, of GGUF files in 8 bits 0.2, in 4 "
        "bits 1.0)",
    )
    parser.add_argument("--output", metavar="FILE", help="JSON file for the report (default: EXPORT/check.json)")


def _check(arguments: argparse.Namespace) -> None:
    from cab_hf.export.check import check_export, describe

    report = check_export(
        arguments.export,
        student=arguments.student,
        data=arguments.data,
        pythons=arguments.python,
        tolerance=arguments.tolerance,
        output=arguments.output,
    )
    print(describe(report))
    differing = [name for name, found in report.items() if not found.get("agrees", True)]
    if differing:
        raise ValueError(f"{arguments.export} differs from its student in {', '.join(differing)}.")


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a saved student, or its Hub id")
    parser.add_argument("--teacher", help="Hub id or folder of its teacher, or smollm2-demo: compare their attention")
    parser.add_argument(
        "--data",
        help="texts (builtin, a file, folder, glob or Hub id) or, for image students, images (digits, a folder, a Hub "
        "id, ...); builtin or digits if not given",
    )
    parser.add_argument("--output", metavar="DIR", help="folder for inspection.json and attention.png")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a text (default: 128)")
    parser.add_argument("--examples", type=int, default=4, help="texts or images (default: 4)")
    parser.add_argument(
        "--layer-map",
        choices=("floor", "uniform", "last"),
        default="floor",
        help="which teacher layer a student layer is compared with (default: floor)",
    )


def _inspect(arguments: argparse.Namespace) -> None:
    from cab_hf.evaluation.inspection import describe, inspect

    report = inspect(
        arguments.folder,
        arguments.teacher,
        data=arguments.data,
        output=arguments.output,
        tokens=arguments.tokens,
        examples=arguments.examples,
        layer_map=arguments.layer_map,
    )
    print(describe(report))


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a saved student, or its Hub id")
    parser.add_argument("--teacher", required=True, help="Hub id or folder of its teacher, or smollm2-demo")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="D",
        help="texts (builtin, a file, folder, glob or Hub id) or, for image students, images (digits, a saved data "
        "set, a Hub id, ...), each as it is or as name=source; of what the student was trained on, the held-out part",
    )
    parser.add_argument("--output", metavar="DIR", help="folder for evaluation.json and the plots (default: FOLDER)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of both models (default: bfloat16 on a GPU, else float32)"
    )
    parser.add_argument(
        "--max_tokens", type=int, default=65536, help="tokens of a text, or images of a set, at most (default: 65536)"
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="*",
        default=[256, 512, 1024, 2048],
        help="prompt lengths of the speed test; none: no test (default: 256 512 1024 2048)",
    )
    parser.add_argument(
        "--gaps",
        type=int,
        nargs="*",
        default=[16, 64, 256],
        help="gaps of the recall tests, in tokens; none: no tests (default: 16 64 256)",
    )
    parser.add_argument(
        "--retrieval_lengths",
        type=int,
        nargs="*",
        default=[],
        help="lengths, in tokens, at which retrieval and loss by position are measured, such as 256 1024 4096 8192 "
        "(default: none)",
    )
    parser.add_argument(
        "--tasks",
        metavar="FOLDER",
        help="folder of lambada_openai.jsonl, piqa.jsonl, ... of mosaicml/llm-foundry, scripts/eval/local_data: both "
        "models answer them (needs lm_eval; default: none)",
    )
    parser.add_argument("--task_limit", type=int, help="first questions of each task (default: all)")
    parser.add_argument(
        "--control",
        choices=("zeroed", "window"),
        help="measure in the student's place itself with mixers that give zero, or its teacher with a window of 64 "
        "tokens and 4 sinks; needs --output",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a batch (default: 8)")
    parser.add_argument("--block_size", type=int, help="tokens of a row (default: the recipe's, or 512)")
    parser.add_argument("--prompts", type=int, default=16, help="held-out beginnings to continue (default: 16)")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens of a continuation (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each speed (default: 3)")
    parser.add_argument("--data_dir", help="folder of the images, where their source needs one")


def _evaluate(arguments: argparse.Namespace) -> None:
    from cab_hf.recipes import RECIPE_NAME
    from cab_hf.runs.report import EVALUATION_NAME, describe, evaluate

    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    report = evaluate(**options)
    print(describe(report))
    print(f"\n  in {arguments.output or arguments.folder}: {', '.join([EVALUATION_NAME, *report['plots']])}")
    if arguments.output is None and (Path(arguments.folder) / RECIPE_NAME).is_file():
        print(f"  its card shows this after: cab-hf card {arguments.folder} --overwrite")


def _sample_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", metavar="TEACHER", help="Hub id or folder of a language model, or smollm2-demo")
    parser.add_argument("out", metavar="OUT.npz", help="file of tokens to write: a recipe's `dataset` reads it")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens to write (default: 1,000,000)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a document at most (default: 512)")
    parser.add_argument(
        "--prompts",
        nargs="+",
        metavar="D",
        help="texts (builtin, a file, folder, glob or Hub id) whose pieces the samples continue (default: they start "
        "from nothing)",
    )
    parser.add_argument("--prompt_length", type=int, default=16, help="tokens of a piece (default: 16)")
    parser.add_argument("--temperature", type=float, default=1.0, help="smaller: less varied (default: 1.0)")
    parser.add_argument("--batch_size", type=int, default=64, help="documents written side by side (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--torch_compile", action="store_true", help="compile the model on a GPU: a minute once, then faster"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the model (default: bfloat16 on a GPU, else float32)"
    )


def _sample(arguments: argparse.Namespace) -> None:
    from cab_hf.data.documents import load_documents
    from cab_hf.data.packing import check_token_path, save_tokens
    from cab_hf.inference import place_and_dtype
    from cab_hf.teachers.loading import load_teacher
    from cab_hf.teachers.sampling import sample_documents

    check_token_path(arguments.out)
    device, dtype = place_and_dtype(arguments.device, arguments.dtype)
    model, tokenizer = load_teacher(arguments.teacher)
    documents = sample_documents(
        model.to(device, dtype),
        tokenizer,
        arguments.tokens,
        length=arguments.length,
        prompts=None if arguments.prompts is None else load_documents(arguments.prompts),
        prompt_length=arguments.prompt_length,
        temperature=arguments.temperature,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        torch_compile=arguments.torch_compile,
    )
    count = save_tokens(arguments.out, documents, tokenizer)
    print(f"{arguments.out}: {count:,} tokens in {len(documents):,} documents.")


def _chat_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="FOLDER", help="a saved student or another causal model, its Hub id, or smollm2-demo"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system's message (default: none)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="tokens of an answer at most (default: 512)")
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="0: the most likely token each time (default: 0.7)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the model (default: bfloat16 on a GPU, else float32)"
    )


def _chat(arguments: argparse.Namespace) -> None:
    from cab_hf.runs.chat import chat

    chat(**{name: value for name, value in vars(arguments).items() if name != "command"})


def _card_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="output folder of a finished recipe")
    parser.add_argument("--license", help="licence of the student (default: the recipe's, or else the teacher's)")
    parser.add_argument("--overwrite", action="store_true", help="replace the card that is there")


def _card(arguments: argparse.Namespace) -> None:
    from cab_hf.runs.card import write_card_of

    print(write_card_of(arguments.folder, license=arguments.license, overwrite=arguments.overwrite))


def _coverage_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="model types (default: all causal ones)")
    parser.add_argument("--output", metavar="FILE.md", help="page to write; its numbers go beside it as JSON")


def _coverage(arguments: argparse.Namespace) -> None:
    from cab_hf.evaluation.coverage import cover, passes

    rows = cover(arguments.families, arguments.output)
    print(f"{sum(map(passes, rows))} of {len(rows)} families become students that pass every check.")


COMMANDS = {
    "distill": Command(
        "turn a Transformer into a Mamba: one command from a teacher and data to a student",
        _distil_options,
        _distil,
        _check_distil,
    ),
    "evaluate": Command("measure a student beside its teacher: quality, recall, speed", _evaluate_options, _evaluate),
    "chat": Command("talk with a student, or with its teacher", _chat_options, _chat),
    "card": Command("write the model card of a finished run again", _card_options, _card),
    "export": Command("write a student as a model that runs without cab_hf's code", _export_options, _export),
    "check": Command("compare an export with its student in every runtime", _check_options, _check),
    "sample": Command("write training text with the teacher itself", _sample_options, _sample),
    "coverage": Command("check which families of transformers become students", _coverage_options, _coverage),
    "inspect": Command("show a student's layers and parameters, and how it attends", _inspect_options, _inspect),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. `{self.prog} --help` lists the options.")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = _Parser(prog="cab-hf", description="Transformers into Mambas.", allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        options = subparsers.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        command.add_options(options)
    return parser


def parse(given: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line.

    Raises:
        ValueError: an argument that is unknown, missing or malformed.
        OSError: a teacher, data or a recipe that is not there.
    """
    parsed, others = make_parser().parse_known_args(given)
    command = COMMANDS[parsed.command]
    if others and command.check is None:
        raise ValueError(f"Unknown options: {' '.join(others)}. `cab-hf {parsed.command} --help` lists them.")
    if command.check is not None:
        parsed.given, parsed.recipe_options = given[1:], others
        command.check(parsed)
    if getattr(parsed, "teacher", None) is not None:
        check_source("teacher", parsed.teacher, "model")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a subcommand; an error is one line on stderr and exit code 1, ctrl-C 130.

    Args:
        arguments: of the command line, without the program's name; those of the process when None.
    """
    with interrupts_in_one_line():
        quiet_bars()
        given = list(sys.argv[1:] if arguments is None else arguments)
        if given[:1] == ["distill"] and "--help-all" in given:
            from cab_hf.recipes import print_recipe_options

            print_recipe_options()
            return
        try:
            parsed = parse(given)
        except (ValueError, OSError) as error:
            end(error)
        from cab_hf.recipes import errors_in_one_line

        way_out = "Give a smaller --batch_size, --tokens or --lengths, or --device cpu."
        with errors_in_one_line(way_out, RuntimeError):
            COMMANDS[parsed.command].run(parsed)


if __name__ == "__main__":
    main()

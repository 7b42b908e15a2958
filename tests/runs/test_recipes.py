"""Recipes, their parsing, and a whole run of the smallest one."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    ViTConfig,
    set_seed,
)

from cab_hf import recipes
from cab_hf.data.documents import load_documents
from cab_hf.data.packing import LanguageCollator
from cab_hf.distillation.trainer import DistillationTrainer
from cab_hf.evaluation.language import compare
from cab_hf.recipes import Recipe, build_recipe, load_recipe, parse_recipe
from cab_hf.runs import run as run_module
from cab_hf.runs.plan import plan
from cab_hf.runs.run import run_recipe, summary
from cab_hf.runs.text import check_data, load_blocks
from cab_hf.teachers.demo import random_llama


ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "training_args").glob("*.yaml"))
SMOKE = str(ROOT / "training_args/smoke.yaml")
ON_CPU = ["--use_cpu", "true", "--bf16", "false"]


def smoke(tmp_path: Path, *options: str):
    return parse_recipe([SMOKE, "--output_dir", str(tmp_path / "student"), "--disable_tqdm", "true", *options])


def blocks_of(recipe: Recipe, tokenizer, model):
    return load_blocks(recipe.data, tokenizer, model, recipe.args, recipe.output_dir / "stages")[:2]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path):
    recipe = parse_recipe([str(path), *ON_CPU])
    listed = load_recipe(path).get("stages", [{}])
    assert len(recipe.stages) == len(listed)
    for (_, args, block_size), stage in zip(recipe.stages, listed):
        assert block_size == stage.pop("block_size", None)
        for name, value in stage.items():
            assert name == "name" or getattr(args, name) == pytest.approx(value) or str(getattr(args, name)) == value
    assert recipe.output_dir == Path("outputs") / path.stem


def test_the_recipe_of_hybrids_is_the_one_that_was_measured():
    windows = ROOT / "benchmarks/quality/windows"
    paths = (ROOT / "training_args/lm_hybrid.yaml", windows / "facts/recipe.yaml")
    own, measured = (parse_recipe([str(path), *ON_CPU]) for path in paths)
    choice = json.loads((windows / "four/keep_attention.json").read_text())
    assert own.model.keep_attention == ["auto:4"] and measured.model.keep_attention == choice["layers"]
    for name in ("attention_window", "attention_sinks", "student_config"):
        assert getattr(own.model, name) == getattr(measured.model, name)
    rows = ("block_size", "repeat_fraction", "fact_fraction")
    for name in (*rows, "recall_gaps", "teacher_tokens", "teacher_continuation_tokens"):
        assert getattr(own.data, name) == getattr(measured.data, name)
    places = {"output_dir", "logging_dir", "run_name"}
    for (_, args, block_size), (_, theirs, their_size) in zip(own.stages, measured.stages, strict=True):
        assert block_size == their_size
        told = {"disable_tqdm", "logging_steps", "report_to", "save_steps", "save_strategy", "save_total_limit"}
        ours, other = args.to_dict(), theirs.to_dict()
        assert {name for name in ours if ours[name] != other[name]} <= places | told


@pytest.mark.parametrize(
    "path", sorted((ROOT / "training_args/accelerate").glob("*.yaml")), ids=lambda path: path.stem
)
def test_accelerate_configs_load(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes >= 1


class TestParsing:
    def test_the_command_line_wins(self, tmp_path):
        recipe = smoke(tmp_path, "--learning_rate", "3e-5", "--teacher", "org/other", "--dataset", "a.txt", "b.txt")
        assert [args.learning_rate for _, args, _ in recipe.stages] == [3e-5, 3e-5]
        assert recipe.model.teacher == "org/other"
        assert recipe.data.dataset == ["a.txt", "b.txt"]

    def test_stages_differ_only_in_what_they_set(self, tmp_path):
        (first, bridge, _), (second, kl, _) = smoke(tmp_path).stages
        assert (first, second) == ("bridge", "kl")
        assert (bridge.kl_weight, bridge.bridge_weight) == (0.0, 1.0)
        assert (kl.kl_weight, kl.bridge_weight) == (1.0, 0.5)
        assert bridge.learning_rate == kl.learning_rate == 1e-3

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([SMOKE, "--learning_rat", "1"], r"'learning_rat'.*'learning_rate'"),
            ([SMOKE, "--bridge_wieght=1"], r"'bridge_wieght'.*'bridge_weight'"),
            ([SMOKE, "--learning_rate", "fast"], "learning_rate.*'fast'"),
            ([SMOKE, "--kl_weight", "-1"], "kl_weight.*-1"),
            ([SMOKE, "--attention_sinks", "8"], "`attention_sinks` is 8, but `attention_window` is 0"),
            ([SMOKE, "--attention_window", "8", "--student_from", "config"], "`attention_window` is 8, but"),
            (
                [SMOKE, "--attention_window", "8", "--output_weight", "1.0"],
                "`output_weight` is 1.0 in stage 'bridge', but with `attention_window`",
            ),
            ([SMOKE, "--student_from", "nothing"], "student_from.*'nothing'"),
            ([SMOKE, "--calibration", "guess"], "calibration.*'guess'"),
        ],
    )
    def test_bad_options_teach(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            parse_recipe(arguments)

    def test_unknown_keys_of_a_recipe_name_the_nearest(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text("teecher: x\n")
        with pytest.raises(ValueError, match=r"'teecher'.*'teacher'"):
            load_recipe(path)
        with pytest.raises(ValueError, match=r"stage 'one'.*'holdout'"):
            build_recipe({"output_dir": "x", "stages": [{"name": "one", "holdout": 3}]})
        with pytest.raises(FileNotFoundError, match="smoke.yaml"):
            load_recipe(ROOT / "training_args/smok.yaml")

    @pytest.mark.parametrize("has_it", [True, False])
    def test_a_cpu_without_bfloat16_trains_in_float32(self, monkeypatch, caplog, has_it):
        monkeypatch.setattr(recipes, "cpu_has_bfloat16", lambda: has_it)
        monkeypatch.setattr(recipes.logger, "warning_once", recipes.logger.warning)
        values = {
            "use_cpu": True,
            "bf16": True,
            "stages": [{"name": "one"}, {"name": "two", "teacher_dtype": "float16"}],
        }
        (_, one, _), (_, two, _) = build_recipe(values).stages
        assert one.bf16 is two.bf16 is has_it
        assert (one.teacher_dtype, two.teacher_dtype) == (None if has_it else "float32", "float16")
        assert ("`bf16` is True, but this CPU" in caplog.text) != has_it
        caplog.clear()
        (_, plain, _), *_ = build_recipe({"use_cpu": True}).stages
        assert plain.teacher_dtype == (None if has_it else "float32") and not caplog.text  # a teacher may come in bf16

    def test_the_command_line_wins_over_stages(self, tmp_path, caplog):
        assert [args.max_steps for _, args, _ in smoke(tmp_path).stages] == [4, 4]
        recipe = smoke(tmp_path, "--max_steps", "2")
        assert [args.max_steps for _, args, _ in recipe.stages] == [2, 2] and "in place of 4" in caplog.text
        assert recipe.values["max_steps"] == 2 and not any("max_steps" in stage for stage in recipe.values["stages"])
        assert [args.kl_weight for _, args, _ in recipe.stages] == [
            args.kl_weight for _, args, _ in smoke(tmp_path).stages
        ]

    def test_lists_of_runs_are_no_options(self, tmp_path):
        with pytest.raises(ValueError, match="`baselines` is a list of runs: write it in a recipe's file"):
            smoke(tmp_path, "--baselines", "[]")

    def test_what_is_no_recipe(self, tmp_path):
        with pytest.raises(ValueError, match="Name a recipe: train_cab.py RECIPE.yaml"):
            parse_recipe([])
        (tmp_path / "broken.yaml").write_text("teacher: [")
        with pytest.raises(ValueError, match="broken.yaml is no YAML: .*line 1"):
            parse_recipe([str(tmp_path / "broken.yaml")])

    def test_numbers_that_yaml_takes_for_text(self):
        assert build_recipe({"output_dir": "x", "learning_rate": "2e-5"}).stages[0].args.learning_rate == 2e-5
        with pytest.raises(ValueError, match="learning_rate.*'2e-5x'"):
            build_recipe({"output_dir": "x", "learning_rate": "2e-5x"})


class TestRun:
    def test_smoke(self, tmp_path):
        options = ["--license", "mit", "--recall_gaps", "4"]
        recipe = smoke(tmp_path, *options)
        report = run_recipe(recipe)
        ((text, after),) = report["after"].items()
        assert after["n_tokens"] > 0 and "4" in after["recall"]
        assert [stage["name"] for stage in report["stages"]] == ["bridge", "kl"]
        assert f"{after['student_perplexity']:.2f}" in summary(report)
        folder = recipe.output_dir
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, model.config.vocab_size)
        card = (folder / "README.md").read_text()
        assert "license: mit" in card and f"{after['n_tokens']:,}" in card
        assert json.loads((folder / "report.json").read_text())["after"][text]["kl"] == after["kl"]
        for stage in ("1-bridge", "2-kl"):
            AutoModelForCausalLM.from_pretrained(folder / "stages" / stage)

        # A second run trains nothing; another recipe does not overwrite it.
        modified = (folder / "model.safetensors").stat().st_mtime
        assert run_recipe(recipe)["after"] == report["after"]
        assert (folder / "model.safetensors").stat().st_mtime == modified
        assert run_recipe(smoke(tmp_path, *options, "--bridge_end", "1.0"))["after"] == report["after"]  # the default
        with pytest.raises(ValueError, match=r"bridge_end: 1.0 there, 0.5 now"):
            run_recipe(smoke(tmp_path, *options, "--bridge_end", "0.5"))
        with pytest.raises(ValueError, match=r"learning_rate: 0.001 there, 0.5 now"):
            run_recipe(smoke(tmp_path, *options, "--learning_rate", "0.5"))

    def test_an_image_model_teaches_no_text(self, tmp_path):
        ViTConfig().save_pretrained(tmp_path / "vit")
        with pytest.raises(ValueError, match="vit' is of the model type 'vit', which is no language model"):
            run_recipe(smoke(tmp_path, "--teacher", str(tmp_path / "vit")))

    def test_a_run_that_never_began_claims_nothing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="`teacher` '/no/such' is no file and no folder"):
            run_recipe(smoke(tmp_path, "--teacher", "/no/such"))
        with pytest.raises(OSError, match="`teacher` 'no/such' is no file and no folder"):
            run_recipe(smoke(tmp_path, "--teacher", "no/such"))
        assert not (tmp_path / "student").exists()
        with pytest.raises(ValueError, match="no field 'stat_size'. Did you mean 'state_size'"):
            run_recipe(smoke(tmp_path, "--student_config", "{stat_size: 32}"))
        report = run_recipe(smoke(tmp_path, "--max_steps", "1"))
        assert [stage["steps"] for stage in report["stages"]] == [1, 1]

    def test_a_stage_has_rows_of_its_own_length(self, tmp_path):
        values = load_recipe("training_args/smoke.yaml") | {
            "output_dir": str(tmp_path / "out"),
            "repeat_fraction": 0.5,
            "license": "mit",
        }
        values["stages"][1] |= {"block_size": "96"}
        seen = []

        class Watched(DistillationTrainer):
            def training_step(self, model, inputs, *given):
                seen.append(tuple(inputs["input_ids"].shape))
                return super().training_step(model, inputs, *given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cab_hf.runs.stages.DistillationTrainer", Watched)
            report = run_recipe(build_recipe(values))
        assert seen == [(2, 64)] * 4 + [(2, 96)] * 4
        assert [stage["tokens"] for stage in report["stages"]] == [4 * 2 * 64, 4 * 2 * 96]
        inputs = json.loads((tmp_path / "out/stages/inputs.json").read_text())
        assert inputs["training text"] != inputs["training text in rows of 96"]
        assert "in rows of 64, then 96 tokens" in (tmp_path / "out/README.md").read_text()
        assert "4 steps, 768 tokens" in plan(build_recipe(values))
        values |= {"finetune": True, "stages": [{"name": "one", "block_size": 96}]}
        with pytest.raises(ValueError, match="one stage, which sets `block_size` to 96"):
            assert build_recipe(values).only_stage
        with pytest.raises(ValueError, match="`block_size` to 96, but images have no rows"):
            build_recipe(values | {"task": "image-classification"})

    def test_the_teacher_writes_text_to_train_on(self, tmp_path, monkeypatch):
        options = [
            "--license",
            "mit",
            "--teacher_tokens",
            "650",
            "--teacher_continuation_tokens",
            "700",
            "--teacher_batch_size",
            "4",
            "--teacher_prompt_length",
            "5",
        ]
        model, tokenizer = random_llama()
        plain = blocks_of(smoke(tmp_path / "plain"), tokenizer, model)[0]
        recipe = smoke(tmp_path, *options)
        blocks, heldout = blocks_of(recipe, tokenizer, model)
        assert 18 <= len(blocks) - len(plain) <= 22 and blocks["input_ids"][: len(plain)] == plain["input_ids"]
        pieces = {tuple(row[i : i + 5]) for row in plain["input_ids"] for i in range(len(row) - 4)}
        for option, tokens in (("teacher_tokens", 650), ("teacher_continuation_tokens", 700)):
            written = load_documents(recipe.output_dir / f"stages/{option}.npz")["input_ids"]
            assert sum(map(len, written)) == tokens
            continued = sum(tuple(row[:5]) in pieces for row in written)  # some pieces lie across two rows
            assert continued > 0.8 * len(written) if option == "teacher_continuation_tokens" else continued == 0

        def never(*args, **kwargs):
            raise AssertionError("text that is there was written again")

        monkeypatch.setattr("cab_hf.runs.text.sample_documents", never)
        assert blocks_of(recipe, tokenizer, model)[0]["input_ids"] == blocks["input_ids"]
        report = run_recipe(recipe)
        assert report["after"].keys() == {"held-out part of the language reference of CPython"}
        assert "and 1,350 tokens that the teacher wrote" in (recipe.output_dir / "README.md").read_text()

    def test_what_the_teacher_cannot_write(self, tmp_path):
        model, tokenizer = random_llama()
        model.config.max_position_embeddings = 64  # as many as a row has tokens; what it writes starts from one more
        blocks_of(smoke(tmp_path / "short", "--teacher_tokens", "130"), tokenizer, model)
        written = load_documents(tmp_path / "short/student/stages/teacher_tokens.npz")["input_ids"]
        assert max(map(len, written)) == 63
        for tokens in ("-5", "63"):
            with pytest.raises(ValueError, match=f"`teacher_tokens` is {tokens}, less than a row of `block_size` 64"):
                blocks_of(smoke(tmp_path / tokens, "--teacher_tokens", tokens), tokenizer, model)
        for options, message in (
            (["--teacher_continuation_tokens", "9"], r"`teacher_continuation_tokens` is 9, less than a row"),
            (
                ["--teacher_prompt_length", "5"],
                r"`teacher_prompt_length` is 5, but `teacher_continuation_tokens` is 0",
            ),
            (["--teacher_batch_size", "0"], r"`teacher_batch_size` is 0. Give at least 1"),
            *(
                (
                    ["--teacher_continuation_tokens", "99", "--teacher_prompt_length", length],
                    rf"`teacher_prompt_length` is {length}, but .* has 64 tokens .* from 2 to 63",
                )
                for length in ("1", "64")
            ),
        ):
            options = ["--teacher_tokens", "130", *options]  # which are right, and not written before the error
            with pytest.raises(ValueError, match=message):
                blocks_of(smoke(tmp_path / "wrong", *options), tokenizer, model)
        assert not (tmp_path / "wrong/student/stages").exists()

    def test_a_killed_run_goes_on_in_its_stage(self, tmp_path, monkeypatch):
        whole = run_recipe(smoke(tmp_path / "whole"))

        class Killed(Exception):
            pass

        step = DistillationTrainer.training_step

        def dying_step(trainer, *args, **kwargs):
            if trainer.args.output_dir.endswith("2-kl") and trainer.state.global_step == 3:
                raise Killed
            return step(trainer, *args, **kwargs)

        monkeypatch.setattr(DistillationTrainer, "training_step", dying_step)
        with pytest.raises(Killed):
            run_recipe(smoke(tmp_path / "cut"))
        monkeypatch.setattr(DistillationTrainer, "training_step", step)
        trained = []
        original = DistillationTrainer.train

        def spied(trainer, *args, **kwargs):
            trained.append((Path(trainer.args.output_dir).name, kwargs["resume_from_checkpoint"]))
            return original(trainer, *args, **kwargs)

        monkeypatch.setattr(DistillationTrainer, "train", spied)
        resumed = run_recipe(smoke(tmp_path / "cut"))
        ((stage, checkpoint),) = trained
        assert stage == "2-kl" and checkpoint.endswith("checkpoint-2")
        assert resumed["after"] == whole["after"]

    def test_student_from_config(self, tmp_path):
        recipe = smoke(
            tmp_path, "--student_from", "config", "--mixer_type", "mamba",
            "--student_config", '{"hidden_size": 16, "num_hidden_layers": 3}', "--sample_prompt", "",
        )  # fmt: skip
        report = run_recipe(recipe)
        model = AutoModelForCausalLM.from_pretrained(recipe.output_dir)
        assert model.config.num_hidden_layers == 3 and model.config.mixer_type == "mamba"
        assert "sample" not in report

    def test_training_goes_on_from_a_student(self, tmp_path):
        first = smoke(tmp_path / "first")
        run_recipe(first)
        second = smoke(tmp_path / "second", "--student", str(first.output_dir))
        report = run_recipe(second)
        (before,), (after,) = report["before"].values(), run_recipe(first)["after"].values()
        assert before["student_perplexity"] == pytest.approx(after["student_perplexity"], rel=1e-5)

    def test_a_finetuned_teacher(self, tmp_path):
        """It is the model itself, trained on labels as the Trainer does it, and may then teach a student."""
        recipe = tmp_path / "teacher.yaml"
        values = {name: value for name, value in load_recipe(SMOKE).items() if name not in ("stages", "save_steps")}
        recipe.write_text(yaml.safe_dump(values | {"finetune": True, "max_steps": 30, "learning_rate": 3e-3}))
        folder = tmp_path / "teacher"
        student = smoke(tmp_path, "--teacher", str(folder), "--teacher_recipe", str(recipe))
        report = run_recipe(student)
        tuned = json.loads((folder / "report.json").read_text())
        (after,) = tuned["after"].values()
        assert after["perplexity_ratio"] < 0.9 and after["kl"] > 0.05 and "before" not in tuned
        assert tuned["train_tokens"] == 30 * 2 * 64 and "finetuned teacher" in summary(tuned)
        (of_student,) = report["after"].values()
        assert of_student["teacher_perplexity"] == pytest.approx(after["student_perplexity"], rel=1e-4)
        model, tokenizer = random_llama()
        blocks, heldout = blocks_of(parse_recipe([str(recipe)]), tokenizer, model)
        saved = AutoModelForCausalLM.from_pretrained(folder)
        assert saved.config.use_cache is True
        found = compare(saved, model, next(iter(heldout.values())), max_tokens=512, progress=False)
        assert found["kl"] == pytest.approx(after["kl"], rel=1e-4)
        args = parse_recipe([str(recipe), "--output_dir", str(tmp_path / "again")]).only_stage[1]
        set_seed(args.seed)
        trainer = Trainer(model, args, train_dataset=blocks, data_collator=LanguageCollator(0))
        trainer.train()
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(weight, saved.state_dict()[name], rtol=1e-4, atol=1e-6)

    def test_a_teacher_that_mixes_documents_is_not_finetuned_on_packed_ones(self, tmp_path):
        tokenizer = random_llama()[1]
        config = BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2)
        BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
        tokenizer.save_pretrained(tmp_path / "bloom")
        options = ["--teacher", str(tmp_path / "bloom"), "--finetune", "true", "--max_steps", "1", *ON_CPU]
        options += ["--block_size", "64", "--eval_max_tokens", "100", "--report_to", "none"]
        with pytest.raises(ValueError, match="packed documents .* but BloomForCausalLM keeps documents apart only by"):
            run_recipe(parse_recipe([*options, "--output_dir", str(tmp_path / "packed")]))
        run_recipe(parse_recipe([*options, "--output_dir", str(tmp_path / "long"), "--isolate_documents", "false"]))

    def test_a_finetuned_teacher_keeps_its_config(self, tmp_path):
        """The Trainer writes the tokenizer's special tokens into it, which may lie beyond the embeddings."""
        model, tokenizer = random_llama()
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / "teacher")
        options = ["--teacher", str(tmp_path / "teacher"), "--finetune", "true", "--max_steps", "2", *ON_CPU]
        options += ["--block_size", "64", "--eval_max_tokens", "100", "--report_to", "none"]
        run_recipe(parse_recipe([*options, "--output_dir", str(tmp_path / "tuned")]))
        tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
        assert tuned.config.pad_token_id == model.config.pad_token_id and tuned.config.use_cache is True
        assert not torch.equal(tuned.lm_head.weight, model.lm_head.weight)

    def test_what_cannot_be_finetuned_is_said_before_training(self, tmp_path, monkeypatch):
        monkeypatch.setattr("cab_hf.runs.stages.train_stage", lambda *args: 1 / 0)
        tokenizer = random_llama()[1]
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=128)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
        options = ["--finetune", "true", "--max_steps", "2", "--block_size", "64", *ON_CPU]
        tokenizer.save_pretrained(tmp_path / "gpt2")
        options += ["--teacher", str(tmp_path / "gpt2")]
        with pytest.raises(ValueError, match="A row has 144 tokens, but GPT2LMHeadModel has positions for 128"):
            run_recipe(parse_recipe([*options, "--recall_gaps", "16", "--output_dir", str(tmp_path / "gap")]))
        for row, more in (("144", ["--isolate_documents", "false"]), ("400", ["--finetune", "false"])):
            with pytest.raises(ValueError, match=r"A row has \d+ tokens, but GPT2LMHeadModel has positions for 128"):
                run_recipe(parse_recipe([*options, "--block_size", row, *more, "--output_dir", str(tmp_path / row)]))
        model = random_llama()[0].requires_grad_(False)  # as transformers loads an adapter's folder
        monkeypatch.setattr("cab_hf.runs.text.load_teacher", lambda name: (model, tokenizer))
        with pytest.raises(ValueError, match="frozen, as an adapter's folder does. Merge the adapter"):
            run_recipe(parse_recipe([*options, "--output_dir", str(tmp_path / "lora")]))

    def test_what_a_finetuned_teacher_has_not(self, tmp_path):
        with pytest.raises(ValueError, match="`finetune` is one stage, but the recipe has 2: write a recipe for each"):
            run_recipe(smoke(tmp_path, "--finetune", "true"))
        with pytest.raises(ValueError, match="`push_to_hub` publishes students .*; `finetune` makes a teacher"):
            run_recipe(smoke(tmp_path, "--finetune", "true", "--push_to_hub", "true"))
        for option, value in (
            ("trainable", "layers.0"),
            ("ema_decay", "0.9"),
            ("student", "x"),
            ("cuda_graph", "true"),
        ):
            folder = ["--output_dir", str(tmp_path / f"only-{option}"), "--teacher", "random-llama"]
            recipe = parse_recipe(["--finetune", "true", f"--{option}", value, *folder, *ON_CPU])
            with pytest.raises(ValueError, match=f"`{option}` is .*, but `finetune` trains the teacher itself"):
                run_recipe(recipe)
        with pytest.raises(ValueError, match="`teacher_config` is for image classifiers"):
            run_recipe(
                parse_recipe(
                    ["--output_dir", str(tmp_path / "x"), "--finetune", "true", "--teacher_config", "{a: 1}", *ON_CPU]
                )
            )

    def test_text_that_is_trained_on_is_not_called_held_out(self, tmp_path, caplog):
        """Files that are trained on, another file with copies, and a pattern whose names divide copies."""
        (tmp_path / "texts").mkdir()
        for name in "abcd":
            (tmp_path / f"texts/{name}.txt").write_text(f"The text of {name}. " * 90)
        (tmp_path / "copy.txt").write_text("The text of b. " * 90)
        (tmp_path / "new.txt").write_text("Something else. " * 90)
        data = ["--dataset", f"{tmp_path}/texts", "--license", "mit"]
        evaluated = [f"{name}={tmp_path}/{name}.txt" for name in ("copy", "new")]
        for run, options, copies in (
            ("one", ["--eval_dataset", *evaluated, f"all={tmp_path}/texts"], {"copy": 1, "new": 0, "all": 4}),
            ("two", ["--eval_dataset", evaluated[1]], {"new": 0}),
        ):
            report = run_recipe(smoke(tmp_path / run, *data, *options))
            assert report["copies"] == copies
            card = (tmp_path / run / "student/README.md").read_text()
            assert ("held-out" in card) == (run == "two")
            assert ("5 of the evaluated documents were also trained on" in card) == (run == "one")
        assert "1 of the 1 evaluated documents (copy) are also trained on" in caplog.text
        (tmp_path / "texts/copy of b.txt").write_text("The text of b. " * 90)
        assert run_recipe(smoke(tmp_path / "three", *data, "--holdout", "b.txt"))["copies"].popitem()[1] == 1
        card = (tmp_path / "three/student/README.md").read_text()
        assert "held-out" not in card and "held_out" not in card

    def test_text_that_changed_since_a_run_began_is_told(self, tmp_path):
        """Whether it is trained on or evaluated on; the same text, or a run without digests, goes on."""
        model, tokenizer = random_llama()

        def texts(folder: str, *contents: str) -> Path:
            (tmp_path / folder).mkdir(exist_ok=True)
            for index, content in enumerate(contents):
                (tmp_path / folder / f"{index}.txt").write_text(content * 90)
            return tmp_path / folder

        def blocks():
            options = ["--dataset", str(tmp_path / "texts"), "--eval_dataset", f"new={tmp_path}/new"]
            recipe = smoke(tmp_path, *options)
            check_data(recipe, *blocks_of(recipe, tokenizer, model))

        texts("texts", "One text. ", "Another text. ")
        texts("new", "Something else. ")
        blocks()
        for file in (tmp_path / "texts").iterdir():
            file.touch()
        blocks()
        kept = tmp_path / "student/stages/inputs.json"
        for folder, contents, changed in (
            ("texts", ("One text, ", "Another text. "), "training text"), ("new", ("Something new. ",), "new")
        ):  # fmt: skip
            texts(folder, *contents)
            with pytest.raises(
                ValueError, match=rf"changed since it began \({changed}\).*--output_dir.*remove {kept}"
            ):
                blocks()
            kept.unlink()
            blocks()

    def test_several_texts(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / f"{name}.txt").write_text(f"The text of {name}. " * 60)
        recipe = smoke(tmp_path, "--eval_dataset", f"one={tmp_path}/a.txt", f"two={tmp_path}/b.txt")
        assert list(run_recipe(recipe)["after"]) == ["one", "two"]
        with pytest.raises(ValueError, match="name=source"):
            run_recipe(smoke(tmp_path / "x", "--eval_dataset", f"{tmp_path}/a.txt"))

    @pytest.mark.slow
    def test_command_line(self, tmp_path, monkeypatch, capfd):
        """As a user runs it: through accelerate, with the student reloaded in a process without cab_hf."""
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", str(ROOT / "train_cab.py"), SMOKE]
        options = ["--output_dir", str(tmp_path / "student"), "--verify_reload", "true", "--sample_prompt", "The"]
        done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "KL to teacher" in done.stdout
        assert re.search(r"In a fresh process without cab_hf, the student continues:\nThe", done.stdout)

        monkeypatch.setattr(sys, "argv", ["train_cab.py", SMOKE, "--blok_size", "3"])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "train_cab.py"), run_name="__main__")
        assert stopped.value.code == 1
        assert "error: Unknown option: 'blok_size'. Did you mean 'block_size'?" in capfd.readouterr().err


@pytest.mark.distributed
def test_two_processes_make_one_student(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--output_dir", str(tmp_path / "student"), "--license", "mit"]
    done = subprocess.run(
        [*launch, str(ROOT / "train_cab.py"), SMOKE, *options], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("KL to teacher") == 1
    report = json.loads((tmp_path / "student/report.json").read_text())
    assert report["train_tokens"] == 8 * 2 * 2 * 64  # steps, processes, rows, tokens
    AutoModelForCausalLM.from_pretrained(tmp_path / "student")


def test_recipes_hold_differences_only():
    """A value that equals the default says nothing."""
    for path in RECIPES:
        values = yaml.safe_load(path.read_text())
        base = values.pop("base", None)
        inherited = {} if base is None else load_recipe(path.parent / base)
        assert load_recipe(path) == inherited | values
        assert all(inherited.get(name, "-") != value for name, value in values.items()), path
        assert "#" in path.read_text(), f"{path} gives no source for its values"


def test_licence_is_demanded_not_guessed(tmp_path):
    recipe = smoke(tmp_path)
    run_recipe(recipe)
    assert not (recipe.output_dir / "README.md").exists()
    assert run_module.REPORT_NAME in {path.name for path in recipe.output_dir.iterdir()}


def test_a_student_without_licence_is_not_trained_to_be_published(tmp_path):
    recipe = smoke(tmp_path, "--push_to_hub", "--hub_model_id", "org/student")
    with pytest.raises(ValueError, match="licence of teacher 'random-llama' is unknown.*--license"):
        run_recipe(recipe)
    assert not recipe.output_dir.exists() or not any(recipe.output_dir.iterdir())

"""accelerate launch train_cab.py RECIPE.yaml [--option value ...]: distil a Transformer into a Mamba.

`--dry_run` says what would happen, and stops.
"""

import argparse

from cab_hf.checks import interrupts_in_one_line, quiet_bars


def main() -> None:
    with interrupts_in_one_line():
        quiet_bars()
        from accelerate import PartialState

        from cab_hf.recipes import errors_in_one_line, parse_recipe
        from cab_hf.runs.plan import plan
        from cab_hf.runs.run import run_recipe
        from cab_hf.runs.stages import tell

        way_out = "Set a smaller per_device_train_batch_size (with more gradient_accumulation_steps) or block_size."
        with errors_in_one_line(way_out):
            parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            parser.add_argument("--dry_run", "--dry-run", action="store_true")
            asked, given = parser.parse_known_args()
            recipe = parse_recipe(given)
            if asked.dry_run:
                tell(recipe, plan(recipe))
            else:
                run_recipe(recipe)
            PartialState().destroy_process_group()


if __name__ == "__main__":
    main()

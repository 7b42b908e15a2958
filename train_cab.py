"""accelerate launch train_cab.py RECIPE.yaml [--option value ...]: distil a Transformer into a Mamba."""

import sys

from accelerate import PartialState

from cab_hf.recipes import errors_in_one_line, parse_recipe
from cab_hf.runs.run import run_recipe


def main() -> None:
    way_out = "Set a smaller per_device_train_batch_size (with more gradient_accumulation_steps) or block_size."
    with errors_in_one_line(way_out):
        run_recipe(parse_recipe(sys.argv[1:]))
        PartialState().destroy_process_group()


if __name__ == "__main__":
    main()

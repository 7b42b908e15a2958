"""accelerate launch train_cab.py RECIPE.yaml [--option value ...]: distil a Transformer into a Mamba."""

import sys

from accelerate import PartialState

from cab_hf.recipes import fail_in_one_line, parse_recipe
from cab_hf.runs.run import run_recipe


def main() -> None:
    try:
        run_recipe(parse_recipe(sys.argv[1:]))
        PartialState().destroy_process_group()
    except (ValueError, OSError, ImportError) as error:
        fail_in_one_line(error)


if __name__ == "__main__":
    main()

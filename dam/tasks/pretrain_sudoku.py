"""Makes the base model that ships with the Sudoku task: python -m dam.tasks.pretrain_sudoku [DIR] [--seed S]."""

from __future__ import annotations

import argparse

from dam.files import usual_modes
from dam.tasks import sudoku


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", default=str(sudoku.BASE_MODEL), help="where to save the model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    model = sudoku.pretrain_base(options.seed)
    with usual_modes(options.directory):
        model.save_pretrained(options.directory)


if __name__ == "__main__":
    main()

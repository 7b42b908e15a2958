"""The file of a grid, as `grid.py` describes it: its methods, data and seeds, and the runs that they make."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


CELL_KEYS = {"methods": list, "data": list, "seeds": list}
KEYS = {"recipe": str, "options": dict, "seeds": list, "methods": dict, "data": dict, "cells": list}
KEYS |= {"reference": str, "plot": list, "plot_data": str, "title": str, "data_label": str}


@dataclass(frozen=True)
class Run:
    method: str
    data: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, {self.data}, seed {self.seed}"

    @property
    def name(self) -> str:
        return f"{slug(self.method)}__{slug(self.data)}__seed{self.seed}"


@dataclass(frozen=True)
class Grid:
    """A grid file; `runs` are in their order: seed by seed, in each data by data."""

    path: Path
    recipe: Path
    options: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    data: dict[str, dict[str, Any]]
    runs: list[Run]
    reference: str
    plot: list[str]
    plot_data: str | None
    title: str
    data_label: str

    @property
    def folder(self) -> Path:
        return self.path.parent

    def result_path(self, run: Run) -> Path:
        return self.folder / "runs" / f"{run.name}.json"

    def claim_path(self, run: Run) -> Path:
        return self.folder / "runs" / f".{run.name}.claim"


def slug(name: str) -> str:
    """A name as it is written in a file's name: without `_`, which parts method, data and seed there."""
    return re.sub(r"[^\w.]+|_+", "-", name.lower().replace("%", " pct")).strip("-.")


def read_grid(path: str | Path) -> Grid:
    """Reads and checks a grid; whether its recipe keys exist is seen when a run is built.

    Raises:
        FileNotFoundError: the grid does not exist.
        ValueError: a key, or a name in `cells` or `reference`, is unknown, a value has the wrong type, or two names
            would be one file.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(map(str, sorted(Path(__file__).parent.glob("*/*grid*.yaml"))))
        raise FileNotFoundError(f"There is no grid {path}. There are: {known or 'none'}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    values = _checked(values, KEYS, str(path))
    for key in ("recipe", "seeds", "methods", "data"):
        if not values.get(key):
            raise ValueError(f"{path} has no `{key}`; a grid needs recipe, seeds, methods and data.")
    methods, data = (_named_options(values[key], key) for key in ("methods", "data"))
    runs = {}
    for cell in values.get("cells", [{}]):
        cell = {"methods": list(methods), "data": list(data), "seeds": values["seeds"]} | _checked(
            cell, CELL_KEYS, f"a cell of {path}"
        )
        names = [list(map(str, cell[key])) for key in ("data", "methods")]
        for asked, known, key in zip(names, (data, methods), ("data", "methods")):
            _check_names(asked, known, f"name in `{key}` of a cell of {path}")
        if not all(type(seed) is int for seed in cell["seeds"]):
            raise ValueError(f"`seeds` in {path} must be whole numbers, such as [0, 1, 2], got {cell['seeds']!r}.")
        runs |= {Run(method, part, seed): None for seed in cell["seeds"] for part in names[0] for method in names[1]}
    orders = [*values["seeds"], *(run.seed for run in runs)], list(data), list(methods)
    reference = values.get("reference", next(iter(methods)))
    _check_names([reference], methods, f"`reference` in {path}")
    _check_names([values["plot_data"]] if "plot_data" in values else [], data, f"`plot_data` in {path}")
    return Grid(
        path=path,
        recipe=Path(values["recipe"]),
        options=values.get("options", {}),
        methods=methods,
        data=data,
        runs=sorted(runs, key=lambda run: [*map(list.index, orders, (run.seed, run.data, run.method))]),
        reference=reference,
        plot=values.get("plot", []),
        plot_data=values.get("plot_data"),
        title=values.get("title", path.resolve().parent.name.replace("_", " ")),
        data_label=values.get("data_label", ""),
    )


def select(
    grid: Grid, methods: Sequence[str] | None, data: Sequence[str] | None, seeds: Sequence[int] | None
) -> list[Run]:
    """The grid's runs of some methods, data and seeds; None: of all."""
    asked = {"method": methods, "data": data, "seed": seeds}
    for part, names in asked.items():
        known = list(dict.fromkeys(getattr(run, part) for run in grid.runs))
        _check_names(names or [], known, f"{part} in {grid.path}")
    return [run for run in grid.runs if all(not names or getattr(run, part) in names for part, names in asked.items())]


def _named_options(values: Mapping[Any, Any], key: str) -> dict[str, dict[str, Any]]:
    """Name -> recipe keys."""
    names: dict[str, str] = {}
    for name, options in values.items():
        if not isinstance(options, dict | None):
            raise ValueError(f"{name!r} in `{key}` must hold recipe keys, got {options!r}; write {{}} for none.")
        other = names.setdefault(slug(str(name)), str(name))
        if other != str(name) or not slug(other):
            raise ValueError(f"{name!r} in `{key}` is {slug(other)!r} in a file's name, as {other!r} is: rename it.")
    return {str(name): options or {} for name, options in values.items()}


def _checked(values: Any, kinds: Mapping[str, type], what: str) -> dict[str, Any]:
    """The mapping, if its keys are known and its values of their kind."""
    if not isinstance(values, dict):
        raise ValueError(f"{what} must be a mapping of {_listed(kinds)}, got {values!r}.")
    _check_names(values, kinds, f"key in {what}")
    for key, value in values.items():
        if not isinstance(value, kinds[key]):
            raise ValueError(f"`{key}` in {what} must be a {kinds[key].__name__}, got {value!r}.")
    return values


def _check_names(names: Iterable[Any], known: Iterable[Any], what: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"Unknown {what}: {name!r}. There are {_listed(known)}.")


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(repr, names))

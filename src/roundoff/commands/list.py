"""`roundoff list`."""

from __future__ import annotations

from collections.abc import Sequence

import click

MOST_LISTED = 20
"""A family of more experiments than this is one line, unless it is asked for."""


@click.command("list")
@click.option("--family", "chosen", multiple=True, metavar="NAME", help="List every experiment of a family alone.")
@click.option("--formats", is_flag=True, help="List the number formats instead.")
def list_command(chosen: Sequence[str], formats: bool) -> None:
    """List the declared experiments, family by family, the profiles and the recipes of hardware."""
    from roundoff.config import ConfigError
    from roundoff.experiments import families, families_named, load_profile, load_recipe, profile_names, recipe_names

    if formats and chosen:
        raise ConfigError("--family chooses experiments, and --formats lists formats instead of them: leave one out")
    if formats:
        _list_formats()
        return
    known = families()
    for family in dict.fromkeys(families_named(chosen)):
        _list_family(family, known[family])
    if chosen:
        return
    for family, ids in known.items():
        if len(ids) <= MOST_LISTED:
            _list_family(family, ids)
        else:
            click.secho(family, bold=True)
            click.echo(f"  {len(ids)} experiments; `roundoff list --family {family}` shows them")
    click.secho("profiles", bold=True)
    width = max(map(len, profile_names()))
    for name in profile_names():
        click.echo(f"  {name:<{width}}  {load_profile(name).title}")
    click.secho("recipes of hardware, to extend or for --hardware", bold=True)
    width = max(map(len, recipe_names()))
    for name in recipe_names():
        click.echo(f"  {name:<{width}}  {load_recipe(name).title}")


def _list_family(family: str, ids: Sequence[str]) -> None:
    """One line for each experiment."""
    from roundoff.experiments import load_experiment

    click.secho(family, bold=True)
    width = max(map(len, ids))
    for name in ids:
        experiment = load_experiment(name)
        against = f"  (against {experiment.baseline})" if experiment.baseline else ""
        click.echo(f"  {name:<{width}}  {experiment.title}{against}")


def _list_formats() -> None:
    """One line for each format of the table, and how to spell one's own."""
    from roundoff.formats.table import FORMATS
    from roundoff.formats.words import HEADER, in_words

    rows = [HEADER, *map(in_words, FORMATS.values())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        click.secho(line, bold=number == 0)
    click.echo(
        "\nBits: of one number with its share of the block's scale, but not of a scale of a\n"
        "row or of the tensor. +tensor: a float32 scale of the tensor beside the blocks'.\n"
        "One's own: element/block/scale wherever a name is taken, such as\n"
        "e2m1/24/e8m0:ceil, e4m3/row/float32 or e2m1/16x16/e4m3+tensor."
    )

"""`roundoff show`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from roundoff.commands.options import profile_option, set_option


@click.command("show")
@click.argument("name")
@profile_option
@set_option
@click.option(
    "--layers/--no-layers",
    default=True,
    help="Load the model, and show the layers touched, AQN's multipliers, and what AQN does before training.",
)
def show_command(name: str, profile_name: str, assignments: Sequence[str], layers: bool) -> None:
    """Show the resolved settings of an experiment, the products of a Linear, its sigma curve and the
    layers it touches; or a recipe of hardware. Nothing is trained."""
    from roundoff.actions import show
    from roundoff.experiments import load_profile, recipe_names, select, with_overrides

    if name in recipe_names():
        click.echo(show.recipe(name), nl=False)
        return
    experiments, profile = with_overrides(select([name]), load_profile(profile_name), assignments)
    for experiment in experiments:
        click.echo(show.settings(experiment, profile))
        click.echo(show.products(experiment.hardware))
        click.echo(show.sigma(experiment, profile))
        if layers:
            click.echo(show.model(experiment, profile))

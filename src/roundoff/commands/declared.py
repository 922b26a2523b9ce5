"""`roundoff list` and `show`: the declared experiments and what each would do."""

from __future__ import annotations

from collections.abc import Sequence

import click

from roundoff.commands.options import profile_option, set_option


@click.command("list")
def list_command() -> None:
    """List the declared experiments, family by family, and the profiles."""
    from roundoff.experiments import families, load_experiment, load_profile, profile_names

    for family, ids in families().items():
        click.secho(family, bold=True)
        width = max(map(len, ids))
        for name in ids:
            experiment = load_experiment(name)
            against = f"  (against {experiment.baseline})" if experiment.baseline else ""
            click.echo(f"  {name:<{width}}  {experiment.title}{against}")
    click.secho("profiles", bold=True)
    for name in profile_names():
        click.echo(f"  {name}  {load_profile(name).title}")


@click.command("show")
@click.argument("name")
@profile_option
@set_option
@click.option(
    "--layers/--no-layers",
    default=True,
    help="Load the model: layers touched, multipliers, and what AQN does before training.",
)
def show_command(name: str, profile_name: str, assignments: Sequence[str], layers: bool) -> None:
    """Show the resolved settings of an experiment, its sigma curve and the layers it touches. Nothing is trained."""
    from roundoff.actions import show as showing
    from roundoff.experiments import load_profile, select, with_overrides

    experiments, profile = with_overrides(select([name]), load_profile(profile_name), assignments)
    for experiment in experiments:
        click.echo(showing.settings(experiment, profile))
        click.echo(showing.sigma(experiment, profile))
        if layers:
            click.echo(showing.model(experiment, profile))

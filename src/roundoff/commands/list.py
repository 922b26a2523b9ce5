"""`roundoff list`."""

from __future__ import annotations

import click


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

"""The commands themselves: `qleak recipe …`, `qleak ls …`, `qleak data …`, `qleak doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qleak.cli import recipes
from qleak.cli.audit import audit
from qleak.cli.epsilon import epsilon
from qleak.cli.evaluate import evaluate
from qleak.cli.film import film
from qleak.cli.runs import runs
from qleak.cli.synth import synth

PASS_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
PLAIN: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None, "pretty_exceptions_enable": False}

app = typer.Typer(help="How much training data can be rebuilt from shared gradients?", **PLAIN)
recipe = typer.Typer(help="Experiments: list, show, run, copy.", **PLAIN)
sets = typer.Typer(help="Data sets: what is here, and how to get the rest.", **PLAIN)
app.add_typer(recipe, name="recipe")
app.add_typer(sets, name="data")
app.add_typer(runs, name="runs")
app.add_typer(synth, name="synth")
app.command()(audit)
app.command()(evaluate)
app.command()(epsilon)
app.command()(film)

Name = Annotated[str, typer.Argument(help="A recipe's name, or ./a_file.py.", autocompletion=recipes.names)]


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """How much training data can be rebuilt from shared gradients?"""
    if version:
        from importlib.metadata import version as installed

        print(f"qleak {installed('qleak')}")
        raise typer.Exit


@recipe.command("ls")
def recipe_ls() -> None:
    """Every recipe and what it claims."""
    recipes.print_list()


@recipe.command("show")
def recipe_show(name: Name) -> None:
    """The recipe's claim and source."""
    recipes.print_source(name)


@recipe.command("copy")
def recipe_copy(name: Name, target: Annotated[Path, typer.Argument(help="File to write.")] = Path()) -> None:
    """Writes the recipe's source to a file of your own, to edit and run."""
    recipes.copy(name, target)


@recipe.command("run", context_settings=PASS_ON, add_help_option=False)
def recipe_run(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A recipe's name, or ./a_file.py.", autocompletion=recipes.names)] = "",
) -> None:
    """Runs a recipe: `qleak recipe run NAME --help` lists its own flags."""
    from qleak.cli.run import run_recipe

    if name in ("", "--help", "-h"):
        print(
            "Usage: qleak recipe run NAME [flags]\n\n`qleak recipe run NAME --help` lists the recipe's flags. Recipes:"
        )
        print("".join(f"  {known}\n" for known in recipes.names("")), end="")
        raise typer.Exit(0 if name else 2)
    run_recipe(name, context.args)


@app.command("ls")
def ls(
    room: Annotated[
        str,
        typer.Argument(
            help="channels, attacks, models, clients, rules, synthesizers, critics, makers, classifiers or data."
        ),
    ],
) -> None:
    """Lists the parts a recipe can be made of."""
    from qleak.cli import listing

    listing.print_room(room)


@sets.command("ls")
def data_ls(folder: Annotated[Path | None, typer.Option("--data-dir", help="Where data sets lie.")] = None) -> None:
    """Data sets: present or not, size, how to get them."""
    from qleak.cli import listing

    listing.print_data(folder)


@sets.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="A data set's name.")],
    folder: Annotated[Path | None, typer.Option("--data-dir", help="Where data sets lie.")] = None,
) -> None:
    """Downloads a data set, where the network allows."""
    from qleak import data

    print(data.fetch(name, folder))


@app.command()
def doctor() -> None:
    """Versions, device, memory and data folders of this machine."""
    from qleak.cli import listing

    listing.print_doctor()


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[Path | None, typer.Option("--out", help="The HTML file to write.")] = None,
    figures: Annotated[Path | None, typer.Option(help="A folder for every figure as SVG, PNG and CSV.")] = None,
) -> None:
    """Renders a stored run again, from its files alone."""
    from qleak.report import html, terminal

    terminal.show(run)
    print(html.write(run, out or run / "report.html"))
    if figures:
        print("\n".join(map(str, html.write_figures(run, figures))))


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or names of folders below --out.")],
    html: Annotated[Path | None, typer.Option(help="Write one page: the frontier, the table, links.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the table as CSV.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
    out: Annotated[Path, typer.Option(help="Where run folders lie.")] = Path("runs"),
) -> None:
    """Audits and trainings side by side: what each channel leaks, and what can be learnt through it."""
    from qleak.cli import compare

    compare.run(runs, html, csv, json, out)

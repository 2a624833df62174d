"""`actcache version`: what is installed, for bug reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import click

from actcache._version import __version__
from actcache.cli.options import debug_option, json_option

_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "huggingface_hub")


@click.command("version")
@json_option
@debug_option
def command(as_json: bool) -> None:
    """Print the versions of actcache, Python and the packages that matter for results; json is that of what --json
    prints."""
    from actcache.cli.output import JSON_VERSION

    versions: dict[str, str | int] = {
        "actcache": __version__,
        "json": JSON_VERSION,
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    if as_json:
        from actcache.cli.output import print_json

        print_json(versions)
        return
    for name, installed in versions.items():
        click.echo(f"{name:16} {installed}")

"""The help of every verb: `python tests/help_text.py > tests/snapshots/help.txt`."""

from __future__ import annotations

from actcache.cli.app import VERBS, run

if __name__ == "__main__":
    for place, verb in enumerate(["", *VERBS]):
        arguments = [verb, "--help"] if verb else ["--help"]
        print(f"{chr(10) if place else ''}$ actcache {' '.join(arguments)}")
        run(arguments)

"""Write the JSON Schemas of `--json` into docs/schemas, and the tables of docs/json.md.

python scripts/make_json.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actcache.cli.app import VERBS
from actcache.cli.results.schemas import schema

DOCS = Path(__file__).resolve().parent.parent / "docs"
DOCUMENT, SCHEMAS = DOCS / "json.md", DOCS / "schemas"
BEGIN, END = "<!-- written by scripts/make_json.py -->", "<!-- end -->"


def fields(made: dict[str, Any], path: str = "") -> Iterator[tuple[str, str, str]]:
    """Each field of what a schema describes: its path, its type, and what is said of it."""
    for part in made.get("anyOf", [made]):
        if "properties" in part:
            for name, value in part["properties"].items():
                here = f"{path}.{name}" if path else name
                yield here, type_of(value), value.get("description", "")
                yield from fields(value, here)
        elif isinstance(part.get("items"), dict):
            yield from fields(part["items"], f"{path}[]")
        elif isinstance(part.get("additionalProperties"), dict):
            yield from fields(part["additionalProperties"], f"{path}.*")


def type_of(made: dict[str, Any]) -> str:
    """A type in a few words."""
    if "anyOf" in made:
        return " or ".join(dict.fromkeys(type_of(part) for part in made["anyOf"]))
    if "enum" in made:
        return " or ".join(f'"{value}"' for value in made["enum"])
    kind = made.get("type", "anything")
    if kind == "array":
        return f"array of {plural(type_of(made['items']))}"
    if kind == "object" and made.get("additionalProperties"):
        return f"object of {plural(type_of(made['additionalProperties']))}"
    return kind if isinstance(kind, str) else " or ".join(kind)


def plural(text: str) -> str:
    """The name of a type, of several."""
    if " or " in text or '"' in text or text == "anything":
        return text
    first, *rest = text.split(" ", 1)
    return " ".join([f"{first}s", *rest])


def table(verb: str) -> str:
    """What `verb` prints."""
    made = schema(verb)
    kind = made.get("type", "object")
    lines = [f"### actcache {verb}", "", f"An {kind} ([schema](schemas/{verb}.json)).", ""]
    lines += ["| field | type | |", "|---|---|---|"]
    for path, text, said in fields(made):
        told = said.replace("None", "null").replace("``", "`").replace("|", "\\|")
        lines.append(f"| `{path}` | {text} | {told} |")
    return "\n".join(lines)


def written(text: str) -> str:
    """The page `text` with the tables in their place."""
    inside = f"{BEGIN}\n\n" + "\n\n".join(table(verb) for verb in VERBS) + f"\n\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: inside, text, flags=re.DOTALL)


if __name__ == "__main__":
    SCHEMAS.mkdir(exist_ok=True)
    for verb in VERBS:
        text = json.dumps(schema(verb), indent=2, ensure_ascii=False) + "\n"
        (SCHEMAS / f"{verb}.json").write_text(text, encoding="utf-8")
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")

"""What verbs print with `--json`: types, and the schemas that are made of them (docs/json.md)."""

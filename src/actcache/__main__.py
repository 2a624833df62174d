"""``python -m actcache`` is the `actcache` command."""

from actcache.cli.app import main

if __name__ == "__main__":
    main()

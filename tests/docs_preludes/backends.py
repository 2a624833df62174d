from pathlib import Path

from actcache.testing.tiny import tiny_model

tiny_model("gpt2").save_pretrained("model")
# The package that the page speaks of, as if it were installed: its module is the page.
Path("my_backends.py").write_text("import __main__\n\n\ndef __getattr__(name):\n    return getattr(__main__, name)\n")
about = Path("my_backends-1.0.dist-info")
about.mkdir()
(about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-backends\nVersion: 1.0\n")
(about / "entry_points.txt").write_text("[actcache.backends]\nhidden-states = my_backends:HiddenStates\n")

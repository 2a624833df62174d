"""The examples that `actcache VERB --help` ends with."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": ("actcache demo", "actcache demo --keep"),
    "warmup": (
        'actcache warmup gpt2 --prompt "The sky is blue." --layers 0,-1',
        "actcache warmup gpt2 prompts.jsonl --raw --sites resid_post,attn_out",
        "actcache warmup gpt2 prompts.csv --label-column truth --store s3://bucket/lab",
    ),
    "plan": ("actcache plan gpt2 prompts.jsonl --raw",),
    "info": ("actcache info", "actcache info gpt2 --json"),
    "list": ("actcache list gpt2",),
    "show": ('actcache show gpt2 "The sky is blue."', 'actcache show gpt2 "[464, 6766, 318]" --json'),
    "lens": (
        'actcache lens gpt2 "The Eiffel Tower is in the city of" --token " Paris"',
        "actcache lens gpt2 --file prompts.txt --html lens.html",
    ),
    "stats": ("actcache stats gpt2",),
    "import": (
        "actcache import ~/.cache/lmprobe --prompts prompts.txt",
        "actcache import vectors.npy --model gpt2 --prompts prompts.txt --site resid_post.6 --pooling mean",
    ),
    "push": (
        "actcache push org/name gpt2",
        "actcache push ./folder gpt2 prompts.csv --label-column truth --metadata-column topic",
    ),
    "pull": ("actcache pull org/name", "actcache pull org/name --layers 6,7 --materialize"),
    "load": (
        "actcache load org/name --layers 6 --out layer6.safetensors",
        "actcache load ./folder --pooling mean --out all.npz",
    ),
    "migrate": ("actcache migrate org/name --dry-run", "actcache migrate org/name"),
    "upgrade": ("actcache upgrade org/name --dry-run", "actcache upgrade ./folder"),
    "dataset-info": ("actcache dataset-info org/name", "actcache dataset-info ./folder --json"),
    "report": (
        "actcache report --out store.html",
        'actcache report gpt2 --prompt "The Eiffel Tower is in" --out gpt2.html',
        "actcache report ./dataset --out dataset.html",
    ),
    "sites": ("actcache sites gpt2",),
    "selftest": ("actcache selftest", "actcache selftest gpt2 --dtype bfloat16"),
    "verify": ("actcache verify", "actcache verify --repair"),
    "evict": ("actcache evict --limit-gb 50",),
    "invalidate": (
        'actcache invalidate gpt2 --prompt "The sky is blue."',
        "actcache invalidate gpt2 prompts.jsonl --store s3://bucket/lab",
    ),
    "clear": ("actcache clear gpt2", "actcache clear gpt2 --space 3f2a91bc --yes", "actcache clear --yes"),
    "config": ("actcache config", "actcache config --store s3://bucket/lab --json"),
    "version": ("actcache version",),
}
"""By verb. Each line can be typed as it stands, with the names of one's own in it."""


def epilog(verb: str) -> str:
    """The examples of a verb for the end of its help; click keeps the lines of a paragraph that begins so."""
    return "\n\n".join(["Examples:", "\b\n" + "\n".join(f"  {line}" for line in EXAMPLES[verb])])

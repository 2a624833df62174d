"""Options that several verbs share. They carry the names of the Python parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from actcache.unified import UnifiedCache

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Settings:
    """What holds for the whole run of the command."""

    debug: bool = False
    verb: str = ""


def _set_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Settings).debug = True


# Accepted before and after the verb, since both are typed.
debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_set_debug, help="Show tracebacks."
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

store_option = click.option(
    "--store",
    metavar="PLACE",
    help="Folder of the store, or its URL: s3://bucket/prefix, gs://..., az://... "
    "[default: $ACTCACHE_BACKEND, $ACTCACHE_DIR, or the user's cache folder]",
)

space_option = click.option(
    "--space", metavar="ID", help="One variant of the model: the id of its space, or the beginning of it (see `info`)."
)


def _parse_layers(_ctx: click.Context, _param: click.Parameter, value: str) -> str | list[int]:
    text = value.strip()
    if text in ("all", "last", "middle"):
        return text
    return _numbers(value, "none of all, last, middle, or numbers like 0,5,-1.")


def _parse_dataset_layers(_ctx: click.Context, _param: click.Parameter, value: str) -> list[int] | None:
    return None if value.strip() == "all" else _numbers(value, "neither all nor numbers like 0,5.")


def _numbers(value: str, otherwise: str) -> list[int]:
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is {otherwise}") from None


def _parse_names(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = tuple(part.strip() for part in value.split(",") if part.strip())
    if not names:
        raise click.BadParameter("name at least one, as in resid_post,attn_out.")
    return names


layers_option = click.option(
    "--layers",
    default="all",
    show_default=True,
    callback=_parse_layers,
    metavar="SPEC",
    help="all, last, middle, or block numbers such as 0,5,-1.",
)

dataset_layers_option = click.option(
    "--layers",
    default="all",
    show_default=True,
    callback=_parse_dataset_layers,
    metavar="NUMBERS",
    help="all, or numbers such as 0,5.",
)


def tensors_option(default: str) -> Callable[[F], F]:
    """Which tensors of a dataset; `default` says in words what is taken without it."""
    return click.option(
        "--tensors",
        callback=_parse_names,
        metavar="NAMES",
        help="hidden_layers, logits_topk, perplexity, router_logits, other sites, or single layers such as attn_out.3. "
        f"[default: {default}]",
    )


dtype_option = click.option("--dtype", metavar="NAME", help="float32, float16, bfloat16 or float64. [default: float32]")

device_option = click.option(
    "--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:1, mps."
)

tokenizer_option = click.option("--tokenizer", metavar="NAME", help="Tokenizer to use when it is not the model's own.")

revision_option = click.option("--revision", metavar="NAME", help="Branch, tag or commit of a model on the Hub.")

attn_implementation_option = click.option(
    "--attn-implementation", metavar="NAME", help="eager, sdpa, flash_attention_2, ..."
)

trust_remote_code_option = click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")

dataset_revision_option = click.option("--revision", metavar="NAME", help="Branch, tag or commit of the repository.")

prompts_column_option = click.option(
    "--column", metavar="NAME", help="Column or field of the prompts' FILE that holds the prompt."
)

shard_max_bytes_option = click.option(
    "--shard-max-bytes", type=click.IntRange(min=1), metavar="N", help="The size that a file reaches. [default: 1 GB]"
)

_MODEL_OPTIONS = (
    layers_option,
    click.option(
        "--sites",
        default="resid_post",
        show_default=True,
        callback=_parse_names,
        metavar="NAMES",
        help="What to read in each block, such as resid_post,attn_out (see `actcache sites`).",
    ),
    click.option(
        "--pooling",
        default="last_token",
        show_default=True,
        metavar="NAME",
        help="One vector per prompt: last_token, first_token, mean, max or min.",
    ),
    click.option(
        "--no-cache-pooled",
        "--raw",
        "raw",
        is_flag=True,
        help="Store the vectors of every token instead of one per prompt.",
    ),
    dtype_option,
    device_option,
    click.option(
        "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Most prompts in a batch."
    ),
    click.option("--max-batch-tokens", type=click.IntRange(min=1), help="Most tokens in a batch. [default: by device]"),
    tokenizer_option,
    revision_option,
    click.option(
        "--backend", default="local", show_default=True, metavar="NAME", help="What runs the model: local, nnsight, ..."
    ),
    click.option("--remote", is_flag=True, help="Run it at the backend's service: of nnsight, NDIF (NDIF_API_KEY)."),
    attn_implementation_option,
    click.option(
        "--compute-perplexity",
        "--perplexity",
        "perplexity",
        is_flag=True,
        help="Perplexity too: the whole model runs.",
    ),
    click.option("--allow-inf", is_flag=True, help="Store values that become inf in the store's dtype."),
    click.option("--trust-names", is_flag=True, help="Use what was imported or pulled under the model's name."),
    click.option(
        "--known-as", metavar="NAME", help="Use what was imported or pulled under NAME: this model is that one."
    ),
    trust_remote_code_option,
    store_option,
)


def model_options(command: F) -> F:
    """Add the options of `UnifiedCache` to a verb, which gets them as keyword arguments for `unified_cache`."""
    for option in reversed(_MODEL_OPTIONS):
        command = option(command)
    return command


def unified_cache(
    model: str,
    *,
    raw: bool,
    perplexity: bool,
    store: str | None,
    trust_names: bool,
    known_as: str | None,
    **options: Any,
) -> UnifiedCache:
    """The cache that the options of `model_options` describe."""
    from actcache.unified import UnifiedCache

    trust = trust_names if known_as is None else known_as
    return UnifiedCache(
        model, compute_perplexity=perplexity, cache_pooled=not raw, store=store, trust_names=trust, **options
    )

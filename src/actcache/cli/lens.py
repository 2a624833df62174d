"""`actcache lens`: what each layer of a model would predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from actcache.cli.files import file_to_write, replaced
from actcache.cli.options import (
    debug_option,
    device_option,
    dtype_option,
    json_option,
    layers_option,
    revision_option,
    store_option,
    tokenizer_option,
    trust_remote_code_option,
)

if TYPE_CHECKING:
    from actcache.capture.lens import LogitLens
    from actcache.cli.prompts import Prompt
    from actcache.unified import UnifiedCache


@click.command("lens")
@click.argument("model")
@click.argument("texts", metavar="PROMPT...", nargs=-1)
@click.option(
    "--file",
    "files",
    multiple=True,
    type=click.Path(allow_dash=True, exists=True, dir_okay=False),
    help="A file of prompts, as `warmup` takes them; - for standard input; repeatable.",
)
@click.option(
    "--position", default=-1, show_default=True, help="Which token's prediction to show, from the end if < 0."
)
@click.option("--top-k", type=click.IntRange(min=1), default=5, show_default=True, help="How many of the best tokens.")
@click.option(
    "--token", "tokens", multiple=True, metavar="TEXT", help="A token whose rank and probability are shown; repeatable."
)
@click.option("--html", metavar="FILE", help="Write a map of all tokens and layers, a page that works by itself.")
@click.option(
    "--translators",
    metavar="PATH",
    type=click.Path(exists=True, file_okay=False),
    help="Folder of a tuned lens (of the package tuned-lens).",
)
@layers_option
@click.option(
    "--site", default="resid_post", show_default=True, metavar="NAME", help="resid_post, resid_mid, resid_pre."
)
@dtype_option
@device_option
@tokenizer_option
@revision_option
@trust_remote_code_option
@store_option
@json_option
@debug_option
def command(
    model: str,
    texts: tuple[str, ...],
    files: tuple[str, ...],
    position: int,
    top_k: int,
    tokens: tuple[str, ...],
    html: str | None,
    translators: str | None,
    layers: Any,
    site: str,
    store: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what MODEL would predict behind each PROMPT if each layer were its last (the logit lens).

    KL is that of the final prediction from the layer's, in nats as the entropy; #0 is the rank of the best token.
    PROMPT is text, or JSON: a list of token ids, or of chat messages. The stream of every token is computed once, and
    stored; after that the model is not loaded. --json prints every position. An encoder-decoder model takes
    --site decoder.resid_post.
    """
    from actcache.cli.output import console, print_json
    from actcache.cli.prompts import read_prompt, read_prompts
    from actcache.model.sites import Site
    from actcache.unified import UnifiedCache

    page = None if html is None else file_to_write("--html", html)
    asked = Site.parse(site)
    sites = tuple(dict.fromkeys([site, str(Site("resid_post", stack=asked.stack))]))
    if not texts and not files:
        raise click.UsageError("Missing argument 'PROMPT...': give prompts, or --file FILE.")
    given = [*map(read_prompt, texts), *(read_prompts(files, ()) if files else ())]
    cache = UnifiedCache(
        model, sites=sites, cache_pooled=False, compute_perplexity=False, store=store, batch_size=None, **options
    )
    # Every prompt has these.
    if position not in (0, -1):
        _require_position(cache, given, position)
    lens = cache.logit_lens(
        given,
        top_k,
        layers=None if layers == "all" else layers,
        site=site,
        tokens=list(tokens),
        translators=translators,
    )
    shown = "\n\n".join(lens.table(i, position, width=console().width) for i in range(len(given)))
    if page is not None:
        with replaced("--html", page) as temporary:
            lens.to_html(temporary, title=f"Logit lens of {cache.model_name}")
    if as_json:
        each = [{"prompt": prompt, "positions": _plain(lens, i)} for i, prompt in enumerate(given)]
        said = {"model_name": cache.model_name, "site": lens.site, "layers": lens.layers}
        print_json({**said, "prompts": each, "html": page})
        return
    console().print(shown, markup=False, soft_wrap=True)
    if page is not None:
        console().print(f"wrote {page}", markup=False, soft_wrap=True)


def _require_position(cache: UnifiedCache, prompts: Sequence[Prompt], position: int) -> None:
    """Refuse a position that a prompt does not have before anything is computed: its tokens tell."""
    from actcache.capture.lens import require_position
    from actcache.extract.prompts import ids_of, read_prompts, tokenize

    read, extractor = read_prompts(prompts), cache.extractor
    tokenize(read, range(len(read)), extractor.source, add_special_tokens=extractor.add_special_tokens)
    for i in range(len(read)):
        require_position(position, i, len(ids_of(read, i)))


def _plain(lens: LogitLens, prompt: int) -> list[dict[str, Any]]:
    """All that the lens says of a prompt, position by position."""
    positions = []
    for at in lens.mask[prompt].nonzero()[:, 0].tolist():
        layers = []
        for place, layer in enumerate(lens.layers):
            best = zip(
                lens.tokens[place, prompt, at].tolist(), lens.probabilities[place, prompt, at].tolist(), strict=True
            )
            chances = lens.chosen_probabilities[place, prompt, at].tolist()
            ranks = lens.chosen_ranks[place, prompt, at].tolist()
            layers.append(
                {
                    "layer": layer,
                    "entropy": lens.entropy[place, prompt, at].item(),
                    "kl": lens.kl[place, prompt, at].item(),
                    "top": [{"token_id": i, "token": lens.text(i), "probability": p} for i, p in best],
                    "chosen": [
                        {"token_id": i, "token": lens.text(i), "probability": p, "rank": rank}
                        for i, p, rank in zip(lens.chosen, chances, ranks, strict=True)
                    ],
                }
            )
        token = int(lens.input_ids[prompt, at])
        positions.append(
            {
                "position": int(lens.positions[prompt, at]),
                "token_id": token,
                "token": lens.text(token),
                "layers": layers,
            }
        )
    return positions

"""What this library adds to the published format, in keys of its own: where activations come from, and checksums.

Each is JSON in the schema metadata of the index, beside the format's keys; readers that do not know them pass them by.

| key | |
|---|---|
| ``actcache:version`` | of these keys: "1" |
| ``actcache:space`` | ``space`` (its id), ``identity`` (what makes two activations the same), ``label`` |
| ``actcache:text_context`` | of which tokenizer and options the token ids are, as a digest; null: of several |
| ``actcache:files`` | path -> ``[bytes, SHA-256]`` of every file with tensors |
| ``actcache:blocks`` | ``block`` (bytes) and ``digest``, see `actcache.share.blocks` |
| ``actcache:sealed`` | true: the index has digests of its own bytes, see `actcache.share.seal` |
| ``actcache:provenance`` | versions that extracted and that wrote, time, what was left out |

A tensor's description has ``site`` (its name here) and ``stored_as`` (the dtypes it was stored in). Where not all
prompts are texts, the column `KIND` says what each is: of a chat, ``text`` is its messages as JSON, of token ids these.
"""

from __future__ import annotations

PREFIX = "actcache:"
VERSION = "1"
SEALED = "sealed"
KIND = "prompt_kind"
KINDS = ("ids", "text", "chat")
"""Names of the kinds of prompts, at the numbers a store has for them."""

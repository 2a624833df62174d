"""What the decoder of an encoder-decoder model is given: the prompt shifted right, as transformers itself shifts it."""

from __future__ import annotations

import pytest
import torch

from actcache.errors import OptionError
from actcache.model.decoder_inputs import decoder_start, decoder_values, require_decoder_start, shift_right
from actcache.testing.tiny import EOS, PAD, tiny_model


@pytest.mark.parametrize(("family", "start"), [("t5", PAD), ("bart", EOS)])
def test_it_is_what_the_model_does_with_the_prompt_as_its_own_target(family, start):
    model = tiny_model(family)
    ids = torch.tensor([[7, 8, 9, 10], [4, 5, 6, 3]])
    seen = []
    decoder = model.get_decoder()
    handle = decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"] if "input_ids" in kwargs else args[0]), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
    handle.remove()
    config = model.config.to_dict()
    assert decoder_start(config) == start
    assert torch.equal(shift_right(ids, require_decoder_start(config)), seen[0])
    assert decoder_values(config) == {"decoder_input": f"shifted-right:{start}"}


def test_the_input_is_left_as_it_was():
    ids = torch.tensor([[7, 8]])
    assert shift_right(ids, 0).tolist() == [[0, 7]]
    assert shift_right(ids[:, :1], 5).tolist() == [[5]]
    assert ids.tolist() == [[7, 8]]


def test_where_the_start_token_is_found():
    assert decoder_start({"decoder_start_token_id": 0, "bos_token_id": 3}) == 0
    assert decoder_start({"decoder_start_token_id": None, "bos_token_id": 3}) == 3
    assert decoder_start({"decoder": {"bos_token_id": 2}}) == 2
    assert decoder_start({"eos_token_id": 1}) is None
    with pytest.raises(OptionError, match=r"set config\.decoder_start_token_id"):
        require_decoder_start({"is_encoder_decoder": True, "pad_token_id": 0})


def test_only_encoder_decoders_have_a_definition():
    assert decoder_values({"decoder_start_token_id": 0}) == {}
    assert decoder_values({"is_encoder_decoder": False, "bos_token_id": 1}) == {}
    # Its encoder can be read all the same.
    assert decoder_values({"is_encoder_decoder": True}) == {"decoder_input": "shifted-right:None"}

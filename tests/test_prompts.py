import json

import numpy as np
import pytest

from actcache.errors import PromptError, PromptTypeError
from actcache.extract.prompts import read_prompts

CHAT = [{"role": "user", "content": "hi"}]


def test_the_three_forms_and_a_single_string():
    read = read_prompts(["text", [1, 2, 3], CHAT, np.array([4, 5])])
    assert read.kinds.tolist() == [1, 0, 2, 0]
    assert read.texts[0] == "text"
    assert read.texts[1] is None
    assert json.loads(read.texts[2]) == CHAT
    assert read.ids[1].tolist() == [1, 2, 3]
    assert read.ids[3].dtype == np.int32
    assert read_prompts("one").texts == ["one"]


def test_the_form_of_a_chat_does_not_depend_on_key_order():
    other = [{"content": "hi", "role": "user"}]
    assert read_prompts([CHAT]).texts == read_prompts([other]).texts


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "empty: expected at least one"),
        (["a", ""], "prompt 1 is empty"),
        ([[1], []], "prompt 1 is empty"),
        ([[1, -2]], "token id -2"),
        ([[{"content": "no role"}]], "without a 'role'"),
        ([[{"role": "user", "content": {1, 2}}]], "not plain text"),
    ],
)
def test_prompts_that_cannot_be_run_are_named(prompts, message):
    with pytest.raises(PromptError, match=message):
        read_prompts(prompts)


@pytest.mark.parametrize("prompt", [7, 1.5, None, b"bytes", [1, "a"], [1.5], [True]])
def test_other_types_are_refused_with_their_position(prompt):
    with pytest.raises(PromptTypeError, match="prompt 1"):
        read_prompts(["fine", prompt])


@pytest.mark.parametrize("prompts", [None, 3, {"a": 1}])
def test_the_list_itself_must_be_one(prompts):
    with pytest.raises(PromptTypeError):
        read_prompts(prompts)


def test_a_set_of_prompts_has_no_order_for_rows_and_labels():
    for prompts in ({"a", "b"}, frozenset({"a", "b"})):
        with pytest.raises(PromptTypeError, match=r"prompts is a (frozen)?set: expected a list"):
            read_prompts(prompts)
    # The keys of a dict have one.
    assert read_prompts({"b": 1, "a": 2}.keys()).texts == ["b", "a"]


def test_ids_as_numpy_and_torch_give_them():
    import torch

    read = read_prompts([list(np.arange(3)), [torch.tensor(4)], torch.tensor([[5, 6]])[0], np.array([7], np.uint16)])
    assert [ids.tolist() for ids in read.ids] == [[0, 1, 2], [4], [5, 6], [7]]
    for wrong in ([np.True_], [torch.tensor(True)], [1.0], [np.float32(1)]):
        with pytest.raises(PromptTypeError, match="prompt 0"):
            read_prompts([wrong])


@pytest.mark.parametrize("others", [[], [[1, 2]]])
def test_text_that_is_not_unicode_is_named(others):
    with pytest.raises(PromptError, match=r"prompt 1 is not valid Unicode text: .* at character 1"):
        read_prompts(["fine", "a\ud800b", *others])

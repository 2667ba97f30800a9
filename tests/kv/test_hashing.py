"""Block names: equal for equal KV, different for anything else, computed once."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dougong.errors import InvalidRequestError
from dougong.kv import BlockHasher, KVSequence
from dougong.kv.hashing import pack_fields

KEY = b"k" * 32


def names(sequence: KVSequence, size: int = 4, key: bytes = KEY, model: str = "m") -> list[bytes]:
    hasher = BlockHasher(size, key, model)
    chain = [hasher.root(sequence.adapter, sequence.cache_salt)]
    hasher.extend(chain, sequence, sequence.num_tokens // size)
    return chain[1:]


def test_equal_prefixes_have_equal_names_and_differ_from_the_first_difference_on() -> None:
    a = names(KVSequence([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]))
    b = names(KVSequence([1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 11, 12]))
    assert a[0] == b[0]
    assert a[1] != b[1]
    assert a[2] != b[2], "equal tokens after different ones have different KV"
    assert len(set(a + b)) == 5


def test_all_that_changes_kv_changes_every_name() -> None:
    tokens = [1, 2, 3, 4]
    variants = [
        names(KVSequence(tokens)),
        names(KVSequence(tokens, adapter="a")),
        names(KVSequence(tokens, adapter="")),
        names(KVSequence(tokens, cache_salt="a")),
        names(KVSequence(tokens, cache_salt="")),
        names(KVSequence(tokens, adapter="a", cache_salt="b")),
        names(KVSequence(tokens, adapter="ab", cache_salt="")),
        names(KVSequence(tokens, adapter="", cache_salt="ab")),
        names(KVSequence(tokens), model="n"),
        names(KVSequence(tokens), key=b"other"),
        names(KVSequence(tokens, multimodal=[(0, 2, b"x")])),
        names(KVSequence(tokens, multimodal=[(0, 2, b"y")])),
        names(KVSequence(tokens, multimodal=[(1, 2, b"x")])),
        names(KVSequence(tokens, multimodal=[(0, 3, b"x")])),
        names(KVSequence(tokens, multimodal=[(0, 1, b"x"), (1, 1, b"x")])),
    ]
    for a, b in combinations(range(len(variants)), 2):
        assert variants[a] != variants[b], f"variants {a} and {b} share a name"


def test_block_size_is_part_of_the_name() -> None:
    assert names(KVSequence([7] * 8), size=8)[0] != names(KVSequence([7] * 8), size=4)[1]


def test_multimodal_content_names_only_the_blocks_from_where_it_stands() -> None:
    plain = names(KVSequence(range(12)))
    image = names(KVSequence(range(12), multimodal=[(4, 6, b"cat")]))
    other = names(KVSequence(range(12), multimodal=[(4, 6, b"dog")]))
    assert plain[0] == image[0] == other[0]
    assert len({plain[1], image[1], other[1]}) == 3
    assert len({plain[2], image[2], other[2]}) == 3


def test_the_same_image_at_another_place_in_its_second_block_has_another_name() -> None:
    """Offset within the item: block 1 shows the image's tokens 4 … 7 in one case and 2 … 5 in the other."""
    a = KVSequence([9] * 8, multimodal=[(0, 8, b"cat")])
    b = KVSequence([9] * 8, multimodal=[(2, 6, b"cat")])
    assert names(a)[1] != names(b)[1]


def test_a_chain_grows_by_what_is_missing_and_equals_one_made_at_once() -> None:
    hasher = BlockHasher(4, KEY, "m")
    sequence = KVSequence(range(6))
    chain = [hasher.root()]
    hasher.extend(chain, sequence, 1)
    first = list(chain)
    sequence.output_token_ids += range(6, 19)
    hasher.extend(chain, sequence, 2)
    hasher.extend(chain, sequence, 4)
    assert chain[:2] == first
    assert chain[1:] == names(KVSequence(range(16)))
    assert len(chain) == 5


def test_prompt_and_output_are_one_sequence_of_tokens() -> None:
    split = KVSequence([1, 2, 3])
    split.output_token_ids += [4, 5, 6, 7, 8]
    assert names(split) == names(KVSequence([1, 2, 3, 4, 5, 6, 7, 8]))
    assert split.token_slice(0, 2) == [1, 2]
    assert split.token_slice(2, 5) == [3, 4, 5]
    assert split.token_slice(3, 8) == [4, 5, 6, 7, 8]


def test_blocks_of_the_first_token_id_count_too() -> None:
    """Token 0 must add something: a prompt of zeros and a longer one are not the same."""
    assert len(set(names(KVSequence([0] * 16)))) == 4


TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40)


@given(st.lists(st.tuples(TOKENS, st.integers(0, 3)), min_size=1, max_size=5))
def test_many_sequences_at_once_are_named_as_each_alone(prompts: list[tuple[list[int], int]]) -> None:
    hasher = BlockHasher(4, KEY, "m")
    jobs = []
    for index, (tokens, done) in enumerate(prompts):
        image = [(0, min(3, len(tokens)), b"cat")] if index % 2 else []
        sequence = KVSequence(tokens[: len(tokens) // 2], multimodal=image)
        sequence.output_token_ids += tokens[len(tokens) // 2 :]
        chain = [hasher.root()]
        hasher.extend(chain, sequence, min(done, sequence.num_tokens // 4))
        jobs.append((chain, sequence, sequence.num_tokens // 4))
    hasher.extend_all(jobs)
    for chain, sequence, _ in jobs:
        assert chain[1:] == names(sequence)


def test_equal_keys_give_equal_names_in_every_process() -> None:
    """Engines that share KV find it by these names: they are part of the format."""
    assert [name.hex() for name in names(KVSequence(range(8)))] == [
        "bc1ff470015664e9d9d19b33cc4f090d702b409edfb0bafc91464a3c48772cdf",
        "0af52b5b6ae5151bf74ed52da76b72c964e0d2226c1510912e5e0deff4e66012",
    ]


def test_long_keys_count_in_full() -> None:
    assert names(KVSequence([1] * 4), key=b"x" * 65) != names(KVSequence([1] * 4), key=b"x" * 64 + b"y")


@pytest.mark.parametrize("bad", [1 << 31, -(1 << 31) - 1, 1.5, "a", None])
def test_a_token_that_is_none_is_named(bad: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"token id .*: token ids are integers from 0 to 2\^31 - 1"):
        names(KVSequence([1, 2, 3, bad, 1, 2, 3, 4]))  # type: ignore[list-item]


FIELD = st.one_of(st.none(), st.binary(max_size=12))


@given(st.lists(FIELD, max_size=4), st.lists(FIELD, max_size=4))
def test_packing_is_injective(a: list[bytes | None], b: list[bytes | None]) -> None:
    assert (pack_fields(*a) == pack_fields(*b)) == (a == b)

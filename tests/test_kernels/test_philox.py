"""The dropout mask is Philox's, the same as Triton's, and a pure function of the position."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_experts.kernels.flash_attention_reference import dropout_keep_mask, philox4x32, uniform

# Known answers of the authors' own library, Random123 (kat_vectors, philox4x32 with 10 rounds): counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    assert philox4x32(words(key), words(counter)) == words(expected)


def test_uniform_numbers_have_31_bits_of_a_word_and_are_under_one() -> None:
    """As Triton's: the upper half of the words is mirrored."""
    found = uniform(torch.tensor([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]))
    assert found.dtype == torch.float32 and found[2] < 1
    assert torch.equal(found[:3], found[3:].flip(0))
    torch.testing.assert_close(found[:2].double(), torch.tensor([0, 2.0**-31]).double(), rtol=1e-6, atol=0)


TRITON_PROGRAM = """
import sys
import torch
import triton
import triton.language as tl
from flash_experts.kernels.flash_attention_reference import dropout_keep_mask

@triton.jit
def keep_kernel(seed_ptr, out_ptr, head, p, M: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, M).to(tl.uint32)[:, None] + tl.zeros([M, N], tl.uint32)
    j = tl.arange(0, N).to(tl.uint32)[None, :] + tl.zeros([M, N], tl.uint32)
    none = tl.zeros([M, N], tl.uint32)
    word, _, _, _ = tl.philox(tl.load(seed_ptr), j, i, none + head, none)
    keep = tl.uint_to_uniform_float(word) > p
    tl.store(out_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], keep.to(tl.int8))

for seed in (0, 7, 2**32 + 5, 2**62 + 123456789):
    for p in (0.1, 0.5):
        seed_1 = torch.tensor([seed])
        ours = dropout_keep_mask(seed_1, range(2, 3), 3, 32, 64, p)[0]
        for head in range(3):
            theirs = torch.empty(32, 64, dtype=torch.int8)
            keep_kernel[(1,)](seed_1, theirs, 2 * 3 + head, p, M=32, N=64)
            assert torch.equal(ours[head], theirs.bool()), (seed, p, head)
print("equal")
"""


def test_equals_triton(tmp_path: object) -> None:
    pytest.importorskip("triton")
    script = os.path.join(str(tmp_path), "program.py")  # Triton reads a kernel's source from its file
    with open(script, "w", encoding="utf-8") as file:
        file.write(TRITON_PROGRAM)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    first=st.tuples(st.integers(0, 2), st.integers(0, 10), st.integers(0, 10)),
    size=st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6)),
)
def test_a_tile_is_a_part_of_the_whole(seed: int, first: tuple[int, int, int], size: tuple[int, int, int]) -> None:
    seed_1 = torch.tensor([seed])
    batch, rows, cols = (range(start, start + length) for start, length in zip(first, size, strict=True))
    whole = dropout_keep_mask(seed_1, 4, 3, 16, 16, 0.4)
    tile = dropout_keep_mask(seed_1, batch, 3, rows, cols, 0.4)
    expected = whole[batch.start : batch.stop, :, rows.start : rows.stop, cols.start : cols.stop]
    assert torch.equal(tile, expected)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_it_keeps_its_share_independently(p: float) -> None:
    keep = dropout_keep_mask(torch.tensor([3]), 2, 4, 64, 64, p)
    count = keep[0].numel()
    deviation = (p * (1 - p) / count) ** 0.5
    assert abs(keep[0].double().mean() - (1 - p)) < 5 * deviation
    for other in (keep[1], dropout_keep_mask(torch.tensor([4]), 1, 4, 64, 64, p)[0], keep[0].transpose(1, 2)):
        agreement = (keep[0] == other).double().mean()
        chance = p**2 + (1 - p) ** 2
        assert abs(agreement - chance) < 8 * (chance * (1 - chance) / count) ** 0.5

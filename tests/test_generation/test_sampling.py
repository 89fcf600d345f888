"""Sampling: transformers' own processors are the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from flash_experts.generation.request import PRESETS, Sampling, sampling_of
from flash_experts.generation.sampling import _invert, candidates, draw, noise


def _by_transformers(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    for warper in warpers:
        scores = warper(None, scores)
    return scores.softmax(dim=-1)


def _by_us(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    probs, ids = candidates(scores, sampling)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs if ids is None else torch.zeros_like(scores).scatter(1, ids, probs)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.sampled_from([7, 600, 1500]),
    spread=st.sampled_from([0.3, 3.0]),  # so flat that 512 tokens do not reach p, and peaked
    temperature=st.floats(0.3, 2.0),
    top_k=st.sampled_from([0, 1, 5, 50, 5000]),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.3, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_distribution_is_that_of_transformers(
    seed: int, vocab_size: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    scores = spread * torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(seed))
    scores[0, : vocab_size // 2] = float("-inf")  # what filters leave
    sampling = Sampling(temperature, top_k, top_p, min_p)

    expected, got = _by_transformers(scores, sampling), _by_us(scores, sampling)

    # A token whose cumulated probability is p to the last bit may fall on either side.
    differing = (expected - got).abs().amax(dim=-1) > 1e-5
    kept = (expected > 0).sum(dim=-1), (got > 0).sum(dim=-1)
    assert all(abs(int(a - b)) <= 1 for a, b in zip(*kept, strict=True))
    assert int(differing.sum()) <= int((kept[0] != kept[1]).sum())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(top_k=4),
        Sampling(0.7, top_p=0.8),
        PRESETS["creative"],
        Sampling(min_p=0.3),
        Sampling(top_k=5, top_p=0.7),  # what top-p is a share of is known only after sorting
        Sampling(1.5, top_k=9, top_p=0.95, min_p=0.05),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    scores = torch.randn(1, 12, generator=torch.Generator().manual_seed(5))
    num_draws = 20_000
    uniform = noise(3, range(num_draws), 1)[:, 0]

    tokens, dead = draw(scores.expand(num_draws, -1), uniform, sampling)

    expected = _by_us(scores, sampling)[0] * num_draws
    counts = tokens.bincount(minlength=12)
    assert not dead.any()
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi_squared = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_squared < 35  # 11 degrees of freedom at most: one in 4,000 by chance, and the seed is fixed


def test_top_p_is_a_share_of_what_top_k_leaves_of_flat_probabilities() -> None:
    """Of twelve nearly equal tokens top-k keeps three, of which the first two reach half of the mass."""
    scores = torch.linspace(0, 0.1, 12).expand(300, -1)
    tokens, _ = draw(scores, noise(3, range(300), 1)[:, 0], Sampling(top_k=3, top_p=0.5))
    assert set(tokens.tolist()) == {10, 11}


@settings(max_examples=60, deadline=None)
@given(K=st.integers(1, 700), zeros=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_a_draw_inverts_the_cumulative_distribution(K: int, zeros: float, seed: int) -> None:
    """Whole numbers have exact sums, so that sums of blocks round nothing."""
    generator = torch.Generator().manual_seed(seed)
    weights_BK = torch.randint(1, 9, (4, K), generator=generator).float()
    weights_BK[torch.rand(4, K, generator=generator) < zeros] = 0
    weights_BK[:, K // 2] = 1
    drawn = torch.rand(2, dtype=torch.float64, generator=generator).tolist()
    noise_B = torch.tensor([0.0, 1 - 2**-53, *drawn], dtype=torch.float64)
    sums_BK = weights_BK.double().cumsum(-1)
    expected = [int((sums > share * sums[-1]).nonzero()[0]) for sums, share in zip(sums_BK, noise_B, strict=True)]
    found_B = _invert(weights_BK, noise_B)
    assert found_B.tolist() == expected
    thirds_BK = weights_BK / 3  # and never to a token of no probability, whatever is rounded
    assert (thirds_BK.gather(1, _invert(thirds_BK, noise_B)[:, None]) > 0).all()


def test_a_draw_beyond_the_rounded_sum_of_its_block_finds_a_possible_token() -> None:
    """Added one by one the small weights vanish, added together they do not: the sum of the block is over 1."""
    weights_1K = torch.full((1, 128), 0.75 * 2**-53)
    weights_1K[0, 0], weights_1K[0, -1] = 1.0, 0.0
    assert weights_1K.sum(dtype=torch.float64) > weights_1K.cumsum(-1, dtype=torch.float64)[0, -1]
    found = _invert(weights_1K, torch.tensor([1 - 2**-53], dtype=torch.float64))
    assert weights_1K[0, found] > 0


def test_rows_without_a_token_are_reported_and_do_not_affect_others() -> None:
    scores = torch.randn(3, 9)
    scores[1] = float("-inf")
    for sampling in (Sampling(), Sampling(top_k=3), Sampling(top_p=0.5, min_p=0.1)):
        tokens, dead = draw(scores, torch.tensor([0.0, 0.5, 0.999999])[:, None].expand(3, 2), sampling)
        assert dead.tolist() == [False, True, False]
        assert ((tokens >= 0) & (tokens < 9)).all()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=3), Sampling(top_p=0.5), Sampling(min_p=0.4)], ids=str)
def test_a_row_is_drawn_from_its_own_scores_and_numbers(sampling: Sampling) -> None:
    """Alone as in a batch, also where a token is drawn again."""
    torch.manual_seed(0)
    scores_BV, noise_B2 = 2 * torch.randn(60, 30), torch.rand(60, 2, dtype=torch.float64)
    together, _ = draw(scores_BV, noise_B2, sampling)
    alone = [draw(scores_BV[row : row + 1], noise_B2[row : row + 1], sampling)[0] for row in range(60)]
    assert torch.equal(together, torch.cat(alone))


def test_noise_of_a_name_depends_on_seed_and_index_alone() -> None:
    together = noise(7, range(10), 5)
    assert torch.equal(noise(7, range(4, 6), 5), together[4:6])
    assert torch.equal(noise(7, range(10), 3), together[:, :3])
    assert not torch.equal(noise(8, range(10), 5), together)
    assert ((together >= 0) & (together < 1)).all()


def test_explicit_settings_override_the_preset_and_none_does_not() -> None:
    assert sampling_of("balanced", temperature=None, top_k=7) == Sampling(0.8, 7, 0.9, guidance=1.25)
    assert sampling_of("creative", top_k=0, top_p=1.0, min_p=0.0, temperature=1.0, guidance=1.0) == Sampling()


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'balanced'"):
        sampling_of("balance")
    with pytest.raises(ValueError, match=r"conservative, balanced, creative"):
        sampling_of("zzz")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", 0.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1),
     ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0), ("guidance", -1), ("guidance", 11)],
)  # fmt: skip
def test_settings_out_of_range_are_named(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=setting):
        sampling_of("balanced", **{setting: value})

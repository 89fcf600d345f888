"""The decoding loop: independence of the batch, the model's own probabilities, the model unchanged afterwards."""

from __future__ import annotations

import copy
from itertools import islice, product
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from flash_experts.generation.decoding import DecodedName, NameDecoder, PromptRows, Prompts
from flash_experts.generation.filters.base import NoTokenLeftError
from flash_experts.generation.generator import NameGenerator, NameSearch
from flash_experts.generation.request import Sampling
from flash_experts.models import GPT2MoEConfig, GPT2MoEForCausalLM, decode_step
from flash_experts.models.attention_backends import attention_backend
from flash_experts.models.scoring import evaluating

END = 0


def _tiny(kind: str, vocab_size: int = 40) -> torch.nn.Module:
    torch.manual_seed(1)
    sizes = {"vocab_size": vocab_size, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    ids = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END, "initializer_range": 0.5}
    if kind == "dense":
        return GPT2LMHeadModel(GPT2Config(**sizes, **ids)).eval()
    if kind in ("llama", "mistral"):
        width = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
        heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
        Config, Model = (
            (LlamaConfig, LlamaForCausalLM) if kind == "llama" else (MistralConfig, MistralForCausalLM)
        )  # fmt: skip
        return Model(Config(vocab_size=vocab_size, **width, **heads, **ids)).eval()
    more: dict[str, Any] = {} if kind == "moe" else {"num_shared_experts": 2}
    if kind == "options":  # of GPT-2, which seldom differ
        more |= {"activation_function": "silu", "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}
    return GPT2MoEForCausalLM(GPT2MoEConfig(**sizes, **ids, num_experts=4, num_experts_per_tok=2, **more)).eval()


def _decode(model: torch.nn.Module, indices: range, sampling: Sampling, steps: int = 30) -> list[DecodedName]:
    with torch.no_grad():
        return list(NameDecoder(model, [END, 5, 9], END, sampling, [], steps, seed=3).stream(indices, len(indices)))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_log_prob_is_that_of_a_forward_without_cache(kind: str) -> None:
    model = _tiny(kind)
    for name in _decode(model, range(25), Sampling(temperature=0.8, top_k=10)):
        ids = torch.tensor([[END, 5, 9, *name.ids, END]])
        with torch.no_grad():
            log_probs = model(ids[:, :-1], use_cache=False).logits.log_softmax(dim=-1)
        each = log_probs[0, 2:].gather(1, ids[0, 3:, None])[:, 0]
        expected = each.sum() if name.is_whole else each[:-1].sum()
        assert name.log_prob == pytest.approx(float(expected), abs=1e-4)


def test_tokens_that_a_filter_forces_count_in_the_log_prob() -> None:
    """What a pattern forces after a gap is judged with the gap: names that lead to it naturally are chosen."""
    model = _tiny("dense")

    def seven_comes_third(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        allowed[:, 7] = ids.shape[1] == 5
        allowed |= ids.shape[1] != 5
        allowed[:, END] &= ids.shape[1] > 5
        return scores.masked_fill(~allowed, -torch.inf)

    decoder = NameDecoder(model, [END, 5, 9], END, Sampling(), [seven_comes_third], 8, seed=3)
    with evaluating(model), torch.no_grad():
        names = list(decoder.stream(range(10), 10))
        for name in names:
            ids = torch.tensor([[END, 5, 9, *name.ids, *[END] * name.is_whole]])
            log_probs = model(ids[:, :-1], use_cache=False).logits.log_softmax(dim=-1)[0, 2:]
            assert name.ids[2] == 7
            assert name.log_prob == pytest.approx(float(log_probs.gather(1, ids[0, 3:, None]).sum()), abs=1e-4)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_name_does_not_depend_on_its_batch(kind: str) -> None:
    model = _tiny(kind)
    sampling = Sampling(0.9, top_k=20, top_p=0.95, repetition_penalty=1.2)
    together = _decode(model, range(30), sampling)
    for size in (1, 4, 13):
        apart = [name for start in range(0, 30, size) for name in _decode(
            model, range(start, min(start + size, 30)), sampling)]  # fmt: skip
        assert [name.ids for name in apart] == [name.ids for name in together]
        assert [name.log_prob for name in apart] == pytest.approx([name.log_prob for name in together], abs=1e-4)


def test_names_follow_the_models_distribution() -> None:
    """All names of up to three tokens of a vocabulary of five, against their exact probabilities."""
    model = _tiny("dense", vocab_size=10)
    num_names, steps = 6_000, 3
    names = _decode(model, range(num_names), Sampling(), steps)
    counts: dict[tuple[int, ...], int] = {}
    for name in names:
        outcome = (*name.ids, END) if name.is_whole else name.ids
        counts[outcome] = counts.get(outcome, 0) + 1

    outcomes = [
        (*body, END) for length in range(steps) for body in product(range(1, 10), repeat=length)
    ] + list(product(range(1, 10), repeat=steps))  # fmt: skip
    probability = {outcome: _probability(model, outcome) for outcome in outcomes}
    assert sum(probability.values()) == pytest.approx(1, abs=1e-4)

    common = [outcome for outcome in outcomes if probability[outcome] * num_names > 8]
    rest = num_names - sum(counts.get(outcome, 0) for outcome in common)
    expected_rest = num_names * (1 - sum(probability[outcome] for outcome in common))
    chi_squared = (rest - expected_rest) ** 2 / expected_rest + sum(
        (counts.get(outcome, 0) - num_names * probability[outcome]) ** 2 / (num_names * probability[outcome])
        for outcome in common
    )
    freedom = len(common)
    assert freedom > 20
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def _probability(model: torch.nn.Module, outcome: tuple[int, ...]) -> float:
    ids = torch.tensor([[END, 5, 9, *outcome]])
    with torch.no_grad():
        log_probs = model(ids[:, :-1]).logits.log_softmax(dim=-1)
    return float(log_probs[0, 2:].gather(1, ids[0, 3:, None]).sum().exp())


def test_repetition_penalty_leaves_the_prompt_and_the_end_alone() -> None:
    """The EOS token is also the BOS token: a penalty on the prompt's tokens would make names longer."""
    model = _tiny("dense")
    strong = _decode(model, range(40), Sampling(repetition_penalty=1e6), steps=12)
    first_of = {name.index: (*name.ids, END)[0] for name in strong}
    plain = {name.index: (*name.ids, END)[0] for name in _decode(model, range(40), Sampling(), steps=12)}
    assert first_of == plain
    assert len({name.ids for name in strong} - {name.ids for name in _decode(model, range(40), Sampling(), 12)}) > 0


def test_finished_rows_leave_the_batch() -> None:
    model = _tiny("dense")
    rows: list[int] = []
    model.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    names = _decode(model, range(50), Sampling())
    assert rows[0] == 1  # the prompt, once
    lengths = [len(name.ids) for name in names]
    assert rows[1:] == [sum(length > step for length in lengths) for step in range(max(lengths))][: len(rows) - 1]


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_bfloat16_weights_round_products_alone(kind: str) -> None:
    """So a step is as near to float32 as the rounding of what goes into each product."""
    model = _tiny(kind).to(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    tokens_B = torch.tensor([3, 7, 11])
    with torch.no_grad():
        by_dtype = []
        for one in (model, exact):
            rows = PromptRows(Prompts(one, [[END, 5, 9]]), range(3))
            rows.advance(tokens_B.tolist(), {})
            rows.advance(tokens_B.flip(0).tolist(), {})
            by_dtype.append(rows.logits_BV)
    assert decode_step.activation_dtype(model) == by_dtype[0].dtype == torch.float32
    rounded, near = by_dtype
    assert 0 < (rounded - near).norm() / near.norm() < 0.1


@pytest.mark.parametrize("kind", ["dense", "moe", "shared", "options"])
def test_steps_of_a_plain_gpt2_are_those_of_its_own_forward(kind: str) -> None:
    """A hook is what makes the decoder call the model itself."""
    model = _tiny(kind)
    assert decode_step.supports(model)
    short = _decode(model, range(30), Sampling(temperature=0.9, top_k=20))
    hook = model.transformer.h[1].register_forward_hook(lambda *_: None)
    assert not decode_step.supports(model)
    by_model = _decode(model, range(30), Sampling(temperature=0.9, top_k=20))
    hook.remove()
    model(torch.tensor([[1, 2]]), output_hidden_states=True)  # transformers leaves hooks of its own, which lie idle
    assert decode_step.supports(model)
    assert [name.ids for name in short] == [name.ids for name in by_model]
    assert [name.log_prob for name in short] == pytest.approx([name.log_prob for name in by_model], abs=1e-4)


def test_what_is_no_plain_gpt2_keeps_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _tiny("dense")
    with attention_backend("sdpa"):
        assert not decode_step.supports(model)
    monkeypatch.setenv("FLASH_EXPERTS_ATTENTION", "reference")
    assert not decode_step.supports(model)
    monkeypatch.delenv("FLASH_EXPERTS_ATTENTION")
    assert decode_step.supports(model)
    hook = model.transformer.h[0].mlp.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    assert not decode_step.supports(model)
    hook.remove()
    assert decode_step.supports(model)
    projection = model.transformer.h[0].attn.c_attn
    projection.__class__ = type("Adapted", (type(projection),), {})  # as an adapter would take its place
    assert not decode_step.supports(model)
    config = GPT2MoEConfig(vocab_size=40, n_embd=16, n_layer=2, n_head=2, num_experts=4, routing="expert_choice")
    assert not decode_step.supports(GPT2MoEForCausalLM(config).eval())


def test_evaluating_restores_each_modules_mode() -> None:
    model = _tiny("dense")
    model.train()
    model.transformer.h[0].eval()  # a frozen part
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == before


def test_rows_that_end_are_refilled_and_names_stay_the_same(model: torch.nn.Module) -> None:
    """Three rows for forty names: every name equals that of a batch of its own, and comes in order."""
    with evaluating(model), torch.no_grad():
        decoder = NameDecoder(model, [END, 5, 9], END, Sampling(temperature=0.9), [], 40, seed=3)
        alone = [next(decoder.stream(range(index, index + 1), 1)) for index in range(40)]
        calls: list[int] = []
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        streamed = list(decoder.stream(range(40), 3))
        handle.remove()
    assert [name.index for name in streamed] == list(range(40))
    for one, other in zip(alone, streamed, strict=True):
        assert one.ids == other.ids and one.is_whole == other.is_whole
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
    tokens = sum(len(name.ids) + 1 for name in streamed)
    longest = max(len(name.ids) for name in streamed)
    assert longest > 16, "the ring grew"
    assert len(calls) <= tokens / 3 + longest + 1, "the rows are full until the last names"


def test_any_number_of_names_may_be_asked_for(model: torch.nn.Module) -> None:
    """The names to come take no memory."""
    with evaluating(model), torch.no_grad():
        decoder = NameDecoder(model, [END, 5, 9], END, Sampling(), [], 40, seed=3)
        many, few = (list(islice(decoder.stream(range(count), 3), 5)) for count in (2**40, 5))
    assert [name.ids for name in many] == [name.ids for name in few]


@pytest.mark.parametrize("kind", ["dense", "moe", "llama", "mistral"])
def test_rows_of_different_prompts_decode_together(kind: str) -> None:
    """Each name is the one that a decoder of its prompt alone gives, with the model's own log-probability."""
    model = _tiny(kind)
    prompts = [[END, 5, 9], [END, 5, 9], [END, 7], [END, 3, 4, 6, 8], [END, 7, 2, 2, 2, 2], [END, 7], [END]] * 4
    with torch.no_grad():
        decoder = NameDecoder(model, (), END, Sampling(temperature=0.9), [], 30, seed=3, prompts=prompts)
        together = list(decoder.stream(range(len(prompts)), 5))
        for index, (name, prompt) in enumerate(zip(together, prompts, strict=True)):
            alone = NameDecoder(model, prompt, END, Sampling(temperature=0.9), [], 30, seed=3)
            (one,) = alone.stream(range(index, index + 1), 1)
            assert one.index == name.index and one.ids == name.ids and one.is_whole == name.is_whole
            ids = torch.tensor([[*prompt, *name.ids, END]])
            log_probs = model(ids[:, :-1], use_cache=False).logits.log_softmax(dim=-1)[0, len(prompt) - 1 :]
            each = log_probs.gather(1, ids[0, len(prompt) :, None])[:, 0]
            expected = each.sum() if name.is_whole else each[:-1].sum()
            assert name.log_prob == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(ValueError, match="different prompts"):
        NameDecoder(model, (), END, Sampling(repetition_penalty=1.2), [], 30, seed=3, prompts=prompts)


def test_steps_of_a_llama_are_those_of_its_own_forward() -> None:
    """A hook is what makes the decoder call the model itself."""
    model = _tiny("llama")
    assert decode_step.supports(model)
    assert not decode_step.supports(_tiny("mistral"))
    by_steps = _decode(model, range(30), Sampling(temperature=0.9, top_k=20))
    hook = model.model.layers[1].register_forward_hook(lambda *_: None)
    assert not decode_step.supports(model)
    by_model = _decode(model, range(30), Sampling(temperature=0.9, top_k=20))
    hook.remove()
    assert [name.ids for name in by_steps] == [name.ids for name in by_model]
    assert [name.log_prob for name in by_steps] == pytest.approx([name.log_prob for name in by_model], abs=1e-4)
    projection = model.model.layers[0].self_attn.q_proj
    projection.__class__ = type("Adapted", (type(projection),), {})  # as an adapter would take its place
    assert not decode_step.supports(model)


def test_a_name_without_a_possible_token_is_not_whole() -> None:
    """Even where the EOS token is the last id, which a draw from nothing gives."""
    model = _tiny("dense")
    end = model.config.vocab_size - 1

    def nothing(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf)

    with torch.no_grad():
        names = list(NameDecoder(model, [END, 5], end, Sampling(), [nothing], 8, seed=3).stream(range(3), 3))
    assert [(name.ids, name.is_whole) for name in names] == [((), False)] * 3


def test_processors_get_rows_of_equal_length() -> None:
    """Text filters take any rows, but a processor of transformers a matrix of tokens."""
    model = _tiny("dense")
    shapes: list[torch.Size] = []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        shapes.append(ids.shape)
        return scores

    with torch.no_grad():
        plain, looked = (
            list(NameDecoder(model, [END, 5], END, Sampling(), processors, 12, seed=3).stream(range(20), 3))
            for processors in ([], [look])
        )
    assert [name.ids for name in looked] == [name.ids for name in plain]
    assert len({len(name.ids) for name in plain}) > 3 and {len(shape) for shape in shapes} == {2}


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2}, {"guidance": 1.5, "type_line": "Creature"}])
def test_a_search_without_room_for_a_name_ends_at_once(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = NameGenerator(model, tokenizer, known_names=[])
    tried, accept = [], NameSearch._accept

    def count(search: NameSearch, *args: Any) -> str:
        tried.append(args)
        return accept(search, *args)

    monkeypatch.setattr(NameSearch, "_accept", count)
    with pytest.raises(NoTokenLeftError, match="no name can be made with starts_with='Goblin of '"):
        generator.generate(20, starts_with="Goblin of ", max_length=11, seed=3, **options)
    assert len(tried) <= 32


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5, top_p=0.9, min_p=0.01), Sampling(top_k=3)])
def test_the_probability_of_a_try_is_how_often_it_comes(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, sampling: Sampling
) -> None:
    decoder = NameDecoder(model, [tokenizer.bos_token_id], tokenizer.eos_token_id, sampling, [], 1, seed=5)
    with evaluating(model), torch.no_grad():
        drawn = [name.ids or (decoder.eos_id,) for name in decoder.stream(range(2000), 500)]
        often = max(set(drawn), key=drawn.count)
        share = drawn.count(often) / len(drawn)
        assert decoder.probability(often) == pytest.approx(share, abs=4 * (share * (1 - share) / 2000) ** 0.5)

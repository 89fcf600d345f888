"""The released model and an MoE model upcycled from it, loaded once for all tests of the playground."""

from __future__ import annotations

from pathlib import Path

import pytest

from flash_experts import GPT2MoEForCausalLM, NameGenerator
from flash_experts.app.service import Playground

BASE = Path(__file__).parent.parent.parent / "models/mtg-base"


@pytest.fixture(scope="session")
def base() -> NameGenerator:
    return NameGenerator.from_pretrained(BASE, "cpu")


@pytest.fixture(scope="session")
def experts(base: NameGenerator) -> NameGenerator:
    model = GPT2MoEForCausalLM.from_dense(BASE, num_experts=4, num_experts_per_tok=2, moe_layer_freq=2)
    return NameGenerator(model.eval(), base.tokenizer, base.known.names)


@pytest.fixture
def playground(base: NameGenerator, experts: NameGenerator) -> Playground:
    return Playground({"dense": base, "experts": experts}, time_limit=600)  # a busy machine ends no request

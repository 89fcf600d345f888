"""``export hub``: a folder that transformers loads where flash-experts cannot be imported."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerFast

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.models.hub import export_for_hub, sources
from flash_experts.models.loading import load_model
from tests.helpers.command_line import run

KINDS = {
    "plain": {},
    "shared": {"num_shared_experts": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 3},
    "sigmoid": {"scoring_func": "sigmoid", "router_bias_update_rate": 0.01, "norm_topk_prob": False},
    "capacity": {"capacity_factor": 1.1, "router_aux_loss_scope": "sequence", "moe_layer_freq": 1},
    "expert_choice": {"routing": "expert_choice"},
}
SCRIPT = """
import json, sys

sys.modules["flash_experts"] = None  # any import of it fails
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer(["goblin, red: Krenko", "angel"], return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        found = model(**batch, output_router_logits=True)
    torch.save([batch["input_ids"], batch["attention_mask"], found.logits, found.aux_loss], folder + "/found.pt")
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(each.grad is not None for each in model.parameters())
    if model.may_generate:
        assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape[1] == batch["input_ids"].shape[1] + 3
    AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(folder + "/again")
    AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
"""


@pytest.fixture(scope="module")
def folders(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each kind, exported, and loaded by a process without flash-experts."""
    place = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    for kind, fields in KINDS.items():
        shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model = GPT2MoEForCausalLM(GPT2MoEConfig(**{**shape, **ids, "num_experts": 4, **fields}))
        for router in (block.mlp.router for block in model.transformer.h if hasattr(block.mlp, "router")):
            router.weight.data.normal_()
        model.save_pretrained(place / "ours" / kind)
        tokenizer.save_pretrained(place / "ours" / kind)
        if kind == "sigmoid":
            model.save_pretrained(place / kind, for_hub=True)
            tokenizer.save_pretrained(place / kind)
        else:
            export_for_hub(place / "ours" / kind, place / kind)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(place / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, *(str(place / kind) for kind in KINDS)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {kind: place / kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_its_logits_and_balancing_loss_are_ours(kind: str, folders: dict[str, Path]) -> None:
    input_ids, attention_mask, logits, aux_loss = torch.load(folders[kind] / "found.pt")
    model = load_model(folders[kind].parent / "ours" / kind, "cpu")
    with torch.no_grad():
        ours = model(input_ids, attention_mask=attention_mask, output_router_logits=True)
    real = attention_mask.bool()
    assert (ours.logits[real] - logits[real]).abs().max() < 1e-5
    assert float(ours.aux_loss) == pytest.approx(float(aux_loss), abs=1e-5)


def test_the_code_imports_nothing_of_ours() -> None:
    files = sources()
    assert {"configuration_gpt2_moe.py", "modeling_gpt2_moe.py", "moe_layer.py", "router.py"} <= files.keys()
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("flash_experts")
                assert not node.level or f"{node.module}.py" in files
    assert "from_dense" not in files["modeling_gpt2_moe.py"] and "grouped_mlp" not in files["moe_layer.py"]


def test_the_card_says_how_to_load_it(folders: dict[str, Path]) -> None:
    card = ModelCard.load(folders["plain"] / "README.md")
    assert (card.data.library_name, card.data.language) == ("transformers", "en")
    assert "trust_remote_code=True" in card.text


def test_saving_for_a_hub_adds_the_same_code(folders: dict[str, Path], tmp_path: Path) -> None:
    for name, text in sources().items():
        assert (folders["sigmoid"] / name).read_text("utf-8") == text
    model = load_model(folders["sigmoid"].parent / "ours/sigmoid", "cpu")
    with pytest.raises(ValueError, match="upload the folder with `hf upload`"):
        model.save_pretrained(tmp_path / "new", for_hub=True, push_to_hub=True)
    assert not (tmp_path / "new").exists()


def test_a_released_model_keeps_what_its_card_says(tmp_path: Path) -> None:
    released = Path(__file__).parents[2] / "models/mtg-names"
    if not (released / "README.md").is_file():
        pytest.skip("the released models are in a checkout")
    export_for_hub(released, tmp_path / "new")
    before, after = ModelCard.load(released / "README.md"), ModelCard.load(tmp_path / "new/README.md")
    assert after.data.base_model == before.data.base_model and after.data.license == before.data.license
    assert after.data.library_name == "transformers" and before.text.strip() in after.text


def test_our_own_commands_run_no_code_of_a_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    done = run("generate", "--model", folders["plain"], cwd=tmp_path)
    assert done.status == 1 and "names code of its own to run, which is never run" in done.err


def test_a_folder_with_content_is_replaced_only_if_asked(workplace: Path, tmp_path: Path) -> None:
    command = ("export", "hub", workplace / "models/moe", "--out", "new")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.json").write_text("mine", "utf-8")
    assert run(*command, cwd=tmp_path).status == 1
    assert (tmp_path / "new/config.json").read_text("utf-8") == "mine"
    assert run(*command, "--overwrite", cwd=tmp_path).status == 0
    assert json.loads((tmp_path / "new/config.json").read_text("utf-8"))["auto_map"]

"""A machine that has PyTorch and transformers alone (a GPU image, say) trains, evaluates and generates."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OPTIONAL = ("ijson", "jsonargparse", "matplotlib", "peft", "platformdirs", "rapidfuzz", "rich", "sklearn", "wandb")

SCRIPT = """
import importlib.util, sys
from pathlib import Path

OPTIONAL = set(sys.argv[2].split(","))
find_spec = importlib.util.find_spec


class Missing:
    '''Answers as if the optional packages were not installed.'''

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
importlib.util.find_spec = lambda name, package=None: None if name in OPTIONAL else find_spec(name, package)

from flash_experts import GPT2MoEForCausalLM, NameGenerator
from flash_experts.data.cards import load_source
from flash_experts.data.cleaning import clean
from flash_experts.evaluation import evaluate_names
from flash_experts.training.build import build_model
from flash_experts.training.model_config import ModelConfig
from flash_experts.training.trainer import Trainer
from flash_experts.training.training_config import TrainingConfig

folder = Path(sys.argv[1])
cards = clean(load_source("embedded").rows).cards[:400]
shape = ModelConfig(num_experts=4, n_layer=2, n_embd=32, n_head=2, vocab_size=400)
model, tokenizer = build_model(None, shape, cards[:300], seed=0)
config = TrainingConfig(output_dir=str(folder), run_name="run", max_steps=2, tokens_per_batch=512, tracker="wandb")
Trainer(model, tokenizer, cards[:300], cards[300:], config).train()
assert isinstance(model, GPT2MoEForCausalLM)
assert 1 < evaluate_names(["Goblin Guide"], str(folder / "run")).bits.value < 10
names = NameGenerator.from_pretrained(folder / "run").generate(2, max_length=8, preset="creative", seed=0)
assert len(names) == 2 and not OPTIONAL & {name.split(".")[0] for name in sys.modules}
print("done")
"""


@pytest.mark.slow
def test_everything_but_extras_runs_without_them(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), ",".join(OPTIONAL)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "done\n", done.stderr[-3000:]
    assert "wandb is not installed" in done.stderr

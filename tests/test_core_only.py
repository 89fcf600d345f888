"""A machine that has PyTorch and transformers alone (a GPU image, say) trains, evaluates and generates.

Cards are prepared elsewhere: the split by family needs rapidfuzz, and without it says so.
"""

from __future__ import annotations

import os
import shutil
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
from flash_experts.data.prepare import load_split, prepare
from flash_experts.evaluation import evaluate, evaluate_names
from flash_experts.training.build import build_model
from flash_experts.training.model_config import ModelConfig
from flash_experts.training.trainer import Trainer
from flash_experts.training.training_config import TrainingConfig

folder = Path(sys.argv[1])
try:
    prepare(folder / "names.txt", folder / "again")
except ValueError as error:
    assert "pip install rapidfuzz" in str(error) and not (folder / "again").exists()
else:
    raise AssertionError("rapidfuzz is there")
train, validation = load_split(folder / "data", "train"), load_split(folder / "data", "validation")
shape = ModelConfig(num_experts=4, n_layer=2, n_embd=32, n_head=2, vocab_size=400)
model, tokenizer = build_model(None, shape, train, seed=0)
config = TrainingConfig(output_dir=str(folder), run_name="run", max_steps=2, tokens_per_batch=512, tracker="wandb")
Trainer(model, tokenizer, train, validation, config).train()
assert isinstance(model, GPT2MoEForCausalLM)
assert 1 < evaluate_names(["Goblin Guide"], str(folder / "run")).bits.value < 10
found = evaluate(folder / "run", folder / "data", samples=20)
assert 1 < found.splits["test"].unconditional.value < 10 and found.detection is None and found.control == ()
names = NameGenerator.from_pretrained(folder / "run").generate(2, max_length=8, preset="creative", seed=0)
assert len(names) == 2 and not OPTIONAL & {name.split(".")[0] for name in sys.modules}
print("done")
"""


@pytest.mark.slow
def test_everything_but_extras_runs_without_them(workplace: Path, tmp_path: Path) -> None:
    shutil.copytree(workplace / "data/mtg", tmp_path / "data")
    shutil.copy(workplace / "names.txt", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), ",".join(OPTIONAL)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "done\n", done.stderr[-3000:]
    assert "wandb is not installed" in done.stderr

"""The examples of docs/change_this.md: each is run, and does what the page says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_examples import example

CITIES = Path(__file__).parent.parent / "examples/extending/cities.txt"


@pytest.mark.slow
def test_custom_dataset_makes_names_that_are_not_in_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    _, said, _ = example(capsys, "extending/custom_dataset.py")
    made = re.findall(r"^  (.+?) +nearest in the list: (.+)$", said, re.MULTILINE)
    listed = set(CITIES.read_text("utf-8").splitlines())
    assert len(made) == 12
    assert not listed & {name for name, _ in made} and {nearest for _, nearest in made} <= listed
    curve = re.search(r"bits per character: (.+)", said)
    assert curve
    steps = [float(bits) for bits in curve[1].split()]
    assert min(steps) < 0.9 * steps[0], "it learns cities"


@pytest.mark.slow
def test_custom_router_is_exact_and_routes(capsys: pytest.CaptureFixture[str]) -> None:
    _, said, _ = example(capsys, "extending/custom_router.py")
    off = re.search(r"logits off by: (\S+)", said)
    assert off and float(off[1]) < 1e-3
    entropies = [float(value) for value in re.findall(r" entropy ([\d.]+)", said)]
    assert len(entropies) == 2 and entropies[0] != entropies[1], "another router routes otherwise"


@pytest.mark.slow
def test_custom_attention_reaches_as_far_as_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    _, said, _ = example(capsys, "extending/custom_attention.py")
    whole, near = (float(nats) for nats in re.findall(r"attention: ([\d.]+) nats", said))
    assert near > whole, "what is far is missed"
    reach = re.search(r"reach: (\d+) tokens, (\d+) expected", said)
    assert reach and 0 < int(reach[1]) <= int(reach[2])
    assert "the same text: True" in said


NEW_RULE = """
    shouts: bool = option(False, "end on an exclamation mark", RULES, label="End with an exclamation mark")
    alliterate: bool"""
USES = """
import gradio as gr

from flash_experts.app import form
from flash_experts.app.settings import Settings
from flash_experts.cli import COMMANDS
from flash_experts.commands.generate import _request_of
from flash_experts.generation import NameRequest

request = NameRequest(shouts=True)
assert request.held_by("Begone!") and not request.held_by("Begone") and NameRequest().held_by("Begone")
assert "shouts=True" in request.describe()
parser = COMMANDS["generate"].make_parser()
assert "end on an exclamation mark" in " ".join(parser.format_help().split())
assert _request_of(parser.parse_args(["--shouts"])) == request
settings = Settings(shouts=True)
assert Settings.from_string(settings.to_string()) == settings and "shouts=1" in settings.to_string()
assert form.settings_of(form.values_of(settings) | {"model": "any"}) == settings
with gr.Blocks():
    assert form.rule_controls()["shouts"].label == "End with an exclamation mark"
"""


@pytest.mark.slow
def test_a_new_rule_is_one_declaration_and_its_use(tmp_path: Path) -> None:
    """In a copy of the package: with a field and a line of `held_by`, Python, the command line and the page have it."""
    pytest.importorskip("gradio", reason="the playground's extra is not installed: pip install -e '.[app]'")
    package = tmp_path / "flash_experts"
    root = Path(__file__).parents[1]
    shutil.copytree(root / "src/flash_experts", package, ignore=shutil.ignore_patterns("__pycache__"))
    constraints = package / "generation/constraints.py"
    text = constraints.read_text("utf-8")
    assert text.count("\n    alliterate: bool") == text.count("and (not self.alliterate or") == 1
    text = text.replace("\n    alliterate: bool", NEW_RULE)
    text = text.replace(
        "and (not self.alliterate", 'and (not self.shouts or text.endswith("!")) and (not self.alliterate'
    )
    constraints.write_text(text, "utf-8")
    done = subprocess.run([sys.executable, "-c", USES], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


NEW_ROUTER_OPTION = """
    router_chill: float = option(0.0, "how calm the router is; 0: not at all", EXPERTS, bounds=(0, 1))
    router_jitter_noise: float"""
ROUTER_USES = """
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.cli import COMMANDS
from flash_experts.training.training_config import ModelConfig

config = GPT2MoEConfig(n_layer=2, router_chill=0.5)
assert GPT2MoEConfig.from_dict(config.to_dict()).router_chill == 0.5
for wrong in (lambda: GPT2MoEConfig(router_chill=2.0), lambda: ModelConfig(router_chill=2.0).validate()):
    with pytest.raises(ValueError, match="router_chill is 2.0, but it must be from 0 to 1"):
        wrong()
dense = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=8, vocab_size=16))
assert GPT2MoEForCausalLM.from_dense(dense, **ModelConfig(router_chill=0.5).moe_fields).config.router_chill == 0.5
for command in ("train", "upcycle"):
    assert "how calm the router is" in " ".join(COMMANDS[command].make_parser().format_help().split())
"""


@pytest.mark.slow
def test_a_new_option_of_the_router_is_one_declaration(tmp_path: Path) -> None:
    """In a copy of the package: with a field, the configuration, upcycling and both commands have it, checked."""
    package = tmp_path / "flash_experts"
    root = Path(__file__).parents[1]
    shutil.copytree(root / "src/flash_experts", package, ignore=shutil.ignore_patterns("__pycache__"))
    options = package / "models/moe_options.py"
    text = options.read_text("utf-8")
    assert text.count("\n    router_jitter_noise: float") == 1
    options.write_text(text.replace("\n    router_jitter_noise: float", NEW_ROUTER_OPTION), "utf-8")
    done = subprocess.run([sys.executable, "-c", ROUTER_USES], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_each_option_of_a_request_is_declared_in_one_module() -> None:
    """A rule is named where it is declared and used, never in a list of the command line or of the page."""
    package = Path(__file__).parents[1] / "src/flash_experts"
    for folder in ("commands", "app"):
        text = "".join(path.read_text("utf-8") for path in (package / folder).glob("*.py"))
        for name in ("alliterate", "min_distance", "regex", "allow_profanity", "top_p", "guidance", "best_of"):
            assert len(re.findall(rf"\b{name}\b", text)) <= 1, (folder, name)

"""The folder of a run: a lock against a second trainer, run.json (data, model, versions), and the model card."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.prompts import CONDITIONS
from flash_experts.files import check_replaced, whole_file
from flash_experts.model_files import CONFIG
from flash_experts.models.hub import CARD, bits_per_character, card_data, origin_of, write_card
from flash_experts.training.checkpoint import checkpoint_steps
from flash_experts.training.distributed import max_over_processes
from flash_experts.training.metrics import multiplied_parameters
from flash_experts.training.run_state import TrainingResult
from flash_experts.training.tracking import BITS_PER_CHAR, METRICS_FILE, read_untrusted_metrics
from flash_experts.training.training_config import TrainingConfig

LOCK_FILE = Path("checkpoints", ".lock")
_PACKAGES = ("flash-experts", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")

# A card without this line is the user's own.
MARK = "<!-- Written by flash-experts train. Remove this line, and a resumed run keeps your changes. -->"
_GIVEN = {"unconditional": BITS_PER_CHAR, "given type, colors, mana value": f"{BITS_PER_CHAR}_given_attributes"}
_TEXT = """{mark}

# {name}

A GPT-2{experts} of {parameters:.1f} million parameters that writes names, trained by flash-experts.

## Load it

```python
from flash_experts import NameGenerator

generator = NameGenerator.from_pretrained("{name}")  # this folder
print([name.text for name in generator.generate(5)])
```
{transformers}
## Training

| | |
| --- | --- |
| started from | {base} |
| names for training | {train_names:,}, SHA-256 `{train_sha256}` |
| names for validation | {validation_names:,}, SHA-256 `{validation_sha256}` |
| source of the names | {source} |
| steps | {steps} |
| seed, device | {seed}, {device} ({processes} process{es}) |
| versions | {versions} |

The whole configuration is in `run.json`, the metrics of each step in `metrics.jsonl`.
"""
_TRANSFORMERS = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
```
"""
_HUB = """
transformers alone loads what `flash-experts export hub` makes of it.
"""
_RESULTS = """
## Results

Bits per character of {names} names that the model has not learned from; the end of a name counts as a character.

| | bits per character |
| --- | --- |
{rows}
"""

# Names that models' configurations have for their dropouts.
DROPOUTS = (
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout", "activation_dropout"),
    *("dropout", "resid_dropout", "embed_dropout"),
)
# Fields of a model's configuration that may differ when a run is resumed: how it is trained, what it can be conditioned
# on (which follows from the training names), and what libraries note.
MAY_CHANGE = {
    *DROPOUTS,
    *("router_aux_loss_coef", "router_aux_loss_scope"),
    *("router_z_loss_coef", "router_jitter_noise", "router_bias_update_rate", "allow_noncausal_generation", CONDITIONS),
    *("transformers_version", "architectures", "dtype", "use_cache", "attention_backend", "name_or_path"),
    *("output_router_logits", "output_attentions", "output_hidden_states", "return_dict"),
}


def check_run_folder(run_dir: Path, overwrite: bool, accelerator: Accelerator) -> None:
    """Raises a ValueError, on all processes, for a folder that is neither new nor empty nor a run's."""
    # The main process decides: a late one would find what the main one has begun.
    problem: ValueError | None = None
    is_run = (run_dir / LOCK_FILE).is_file() or checkpoint_steps(run_dir)
    if accelerator.is_main_process and not is_run:
        try:
            check_replaced(run_dir, overwrite, "the run's folder")
        except ValueError as error:
            problem = error
    if max_over_processes(accelerator, [float(problem is not None)]) == [1.0]:
        raise problem or ValueError(f"the run's folder {run_dir} is refused by the main process, see its error")


@contextmanager
def run_lock(run_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """While open, no second trainer can use the run's folder, which is created; a ValueError if one does.

    The main process holds a lock (``flock``), which ends with it.
    """
    lock, refused = FileLock(run_dir / LOCK_FILE, blocking=False), False
    if accelerator.is_main_process:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            refused = True
    if max_over_processes(accelerator, [float(refused)]) == [1.0]:
        raise ValueError(
            f"another process is training into {run_dir}: wait for its end, stop it, or choose another run_name"
        )
    try:
        yield
    except BaseException:
        if accelerator.is_main_process:
            with suppress(OSError):  # Windows does not remove the open lock file
                _remove_if_nothing_was_written(run_dir)
        raise
    finally:
        lock.release()


def _remove_if_nothing_was_written(run_dir: Path) -> None:
    checkpoints, lock = run_dir / "checkpoints", run_dir / LOCK_FILE
    if [*run_dir.iterdir()] == [checkpoints] and [*checkpoints.iterdir()] == [lock]:
        lock.unlink()
        checkpoints.rmdir()
        run_dir.rmdir()


def fingerprint(cards: Sequence[Card]) -> str:
    """SHA-256 of the cards in their order."""
    digest = hashlib.sha256()
    for card in cards:
        digest.update(json.dumps(card.to_json(), sort_keys=True).encode())
    return digest.hexdigest()


def describe_data(train: Sequence[Card], validation: Sequence[Card], meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """Counts and hashes of the splits, with meta.json."""
    described: dict[str, Any] = {
        "train_names": len(train),
        "train_sha256": fingerprint(train),
        "validation_names": len(validation),
        "validation_sha256": fingerprint(validation),
    }
    return described if meta is None else described | {"meta": dict(meta)}


def _identity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, validation_sha256: str | None
) -> dict[str, Any]:
    """What must be equal on resuming: tokenizer, validation names, and model configuration without `MAY_CHANGE`."""
    config = model.config.to_dict()
    kept = {name: value for name, value in config.items() if name not in MAY_CHANGE and not name.startswith("_")}
    return {
        "tokenizer": _sha256_of_tokenizer(tokenizer),
        "validation_names": validation_sha256,
        "model_config": json.loads(json.dumps(kept, default=str)),
    }


def _sha256_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    about: dict[str, Any] = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    for name in ("padding", "truncation"):  # settings of the last call
        about.pop(name, None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps([about, special], sort_keys=True).encode()).hexdigest()


def describe_run(
    config: TrainingConfig,
    data: dict[str, Any],
    origin: Mapping[str, Any] | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    validation_sha256: str | None,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """The content of run.json."""
    return {
        "config": config.to_dict(),
        "data": data,
        "model": {"type": model.config.model_type, "parameters": multiplied_parameters(model)},
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "git_commit": git_commit(),
        "versions": versions(),
        "origin": dict(origin or {}),
        "identity": _identity(model, tokenizer, validation_sha256),
    }


def versions() -> dict[str, str]:
    """Versions of Python, the platform and packages that can change results."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of this package's source, "+" if files differ; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # A copy installed below some other project's checkout is not that project's commit.
        git("ls-files", "--error-unmatch", __file__)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_run_info(path: Path, info: dict[str, Any]) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(info, indent=2, default=str) + "\n", encoding="utf-8")


def write_run_card(run_dir: Path, info: Mapping[str, Any], result: TrainingResult, overwrite: bool = False) -> None:
    """Writes the model's card, if there is a model, from ``info``, the content of run.json.

    A card of the user's own stays without ``overwrite``.
    """
    path = run_dir / CARD
    if not (run_dir / CONFIG).is_file():
        return
    if path.exists() and not overwrite and MARK not in path.read_text("utf-8", errors="replace"):
        return
    data, origin = info["data"], info["origin"]
    source = data.get("meta", {}).get("source")
    validations = [line for line in read_untrusted_metrics(run_dir / METRICS_FILE) if line.get("event") == "validation"]
    best = next((line for line in validations if line["step"] == result.best_step), {})
    values = {given: best[name] for given, name in _GIVEN.items() if name in best}
    base_model, license = origin_of(origin.get("base"))
    bits = bits_per_character(source, "validation", values)
    metadata = card_data(run_dir.name, info["model"]["type"], source, base_model, license, bits)
    with whole_file(path) as temporary:
        write_card(temporary, metadata, _text(run_dir.name, info, result, values))


def _text(name: str, info: Mapping[str, Any], result: TrainingResult, values: Mapping[str, float]) -> str:
    data, base, config = info["data"], info["origin"].get("base"), info["config"]
    meta = data.get("meta", {})
    is_moe = info["model"]["type"] == "gpt2_moe"
    best = f", of which the best, step {result.best_step:,}, is here" if values else ""
    text = _TEXT.format(
        mark=MARK,
        name=name,
        experts=" with mixture-of-experts layers" if is_moe else "",
        parameters=info["model"]["parameters"]["total"] / 1e6,
        transformers=_HUB if is_moe else _TRANSFORMERS.format(name=name),
        base="nothing: a new model" if base is None else f"`{Path(base).name if Path(base).exists() else base}`",
        source=", ".join(str(meta[key]) for key in ("source", "version") if meta.get(key)) or "not known",
        steps=f"{result.step:,} ({result.reason}){best}",
        seed=config["seed"],
        device=info["device"],
        processes=info["processes"],
        es="" if info["processes"] == 1 else "es",
        versions=", ".join(f"{package} {version}" for package, version in info["versions"].items()),
        **{key: data[key] for key in ("train_names", "train_sha256", "validation_names", "validation_sha256")},
    )
    if not values:
        return text
    rows = "\n".join(f"| {given} | {value:.3f} |" for given, value in values.items())
    scored = min(data["validation_names"], config["validation_names"] or data["validation_names"])
    return text + _RESULTS.format(names=f"{scored:,}", rows=rows)

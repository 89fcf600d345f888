#!/usr/bin/env sh
# make demo: from card names to new names, with the time of each step on two cores.
# Finished steps are skipped; `make clean` starts over.
set -eu
export TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1

step() { printf '\n== %s\n' "$1"; }

step "1/5  Prepare: clean 35,000 real cards, split them by family; cards of other franchises, which no model here was trained on, go to a folder of their own (30 seconds)"
flash-experts prepare
flash-experts prepare --only franchises --out data/franchises

step "2/5  Upcycle: the dense GPT-2 in models/mtg-base becomes an MoE model of 8 experts with the same output (10 seconds)"
if [ -f models/demo-upcycled/config.json ]; then
  echo "models/demo-upcycled already exists"
else
  flash-experts upcycle models/mtg-base --num-experts 8 --router-aux-loss-coef 0.05 --out models/demo-upcycled
fi

step "3/5  Fine-tune the experts on the 2,500 names of those franchises, three passes: more would memorize them (1 to 3 minutes); wandb records it in ./wandb, offline without a key"
flash-experts train --config quickstart --base models/demo-upcycled --data data/franchises --training.run-name demo-names --training.max-epochs 3 --training.eval-every 20 --training.sample-every 20

step "4/5  Compare on unseen names of the franchises: the base, the fine-tuned experts, the released model (1 to 3 minutes)"
report=models/demo-names/report.html
if [ -f $report ] && [ $report -nt models/demo-names/model.safetensors ]; then
  echo "$report is already newer than the model"
else
  flash-experts compare models/mtg-base models/demo-names models/mtg-names --data data/franchises --samples 300 --out $report --overwrite
fi

step "5/5  Names for several kinds of cards, none of them a real card; sampling settings, and the base for comparison (30 seconds)"
python examples/generate_mtg_names.py models/demo-names

cat <<'END'

Try next:
  . .venv/bin/activate
  flash-experts generate --type "Legendary Creature - Dragon" --colors UR --count 10     (the released model's names)
  flash-experts generate --model models/demo-names --type Instant --starts-with Th --preset creative
  flash-experts train --config quickstart --data data/franchises --training.max-epochs 3 --training.run-name demo-wide --model.num-experts 16
  flash-experts compare models/demo-names models/demo-wide --data data/franchises       (then open the report that it names)
END

#!/usr/bin/env sh
# make demo: from card names to new names, each step with what it does and how long it takes on two cores.
# Finished steps are not done again; `make clean` starts over.
set -eu
export TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1

step() { printf '\n== %s\n' "$1"; }

step "1/5  Prepare: clean 35,000 real cards, split them by family (15 seconds)"
flash-experts prepare

step "2/5  Upcycle: the dense GPT-2 in models/mtg-base becomes 8 experts that compute the same (10 seconds)"
if [ -f models/demo-upcycled/config.json ]; then
  echo "models/demo-upcycled is there already"
else
  flash-experts upcycle models/mtg-base --num-experts 8 --out models/demo-upcycled
fi

step "3/5  Fine-tune the experts on the names (3 minutes of training and validation); wandb records it in ./wandb, offline without a key"
flash-experts train --config configs/quickstart.yaml --base models/demo-upcycled

step "4/5  Compare on unseen names: the base, the experts after their three minutes, the released ones (2 to 4 minutes)"
report=models/quickstart/report.html
if [ -f $report ] && [ $report -nt models/quickstart/model.safetensors ]; then
  echo "$report is newer than the model already"
else
  flash-experts compare models/mtg-base models/quickstart models/mtg-names --samples 300 --out $report --overwrite
fi

step "5/5  Names for several kinds of cards, none of them a real card; sampling settings, and the base next to it (30 seconds)"
python examples/generate_mtg_names.py models/quickstart

cat <<'END'

Try next:
  . .venv/bin/activate
  flash-experts generate --type "Legendary Creature - Dragon" --colors UR --count 10     (the released model's names)
  flash-experts generate --model models/quickstart --type Instant --starts-with Th --preset creative
  flash-experts train --config configs/quickstart.yaml --training.run-name wide --model.num-experts 16
  flash-experts compare models/quickstart models/wide       (then open the report that it names)
END

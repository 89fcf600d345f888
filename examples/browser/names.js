// Names from the ONNX file: the logits of all names at once, one token after another.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";

const MOST_TOKENS = 24; // of a name
ort.env.wasm.numThreads = 1; // more need a server that isolates the page from other origins

/** One token from logits: the likeliest at temperature 0, else drawn from their softmax. */
function draw(logits, temperature) {
  const best = logits.reduce((most, value, token) => (value > logits[most] ? token : most), 0);
  if (temperature === 0) return best;
  const weights = logits.map((value) => Math.exp((value - logits[best]) / temperature));
  let left = Math.random() * weights.reduce((sum, weight) => sum + weight, 0);
  return Math.max(weights.findIndex((weight) => (left -= weight) < 0), 0);
}

async function generate({ session, tokenizer, config }, prompt, count, temperature) {
  const { bos_token_id: bos, eos_token_id: eos, n_positions: positions } = config;
  const start = [bos, ...tokenizer.encode(prompt).ids];
  const rows = Array.from({ length: count }, () => [...start]);
  const most = Math.min(start.length + MOST_TOKENS, positions);
  for (let length = start.length; length < most && rows.some((row) => row.at(-1) !== eos); length++) {
    const ids = new ort.Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [count, length]);
    const { logits } = await session.run({ input_ids: ids });
    const tokens = logits.dims[2];
    rows.forEach((row, number) => {
      const end = (number + 1) * length * tokens;
      const ended = length > start.length && row.at(-1) === eos;
      row.push(ended ? eos : draw(logits.data.subarray(end - tokens, end), temperature));
    });
  }
  return rows.map((row) => tokenizer.decode(row.slice(start.length).filter((id) => id !== eos)).trim());
}

const form = document.querySelector("form");
const [status, list, button] = ["[role=status]", "ol", "button"].map((each) => document.querySelector(each));
try {
  const read = async (file) => (await fetch(`model/${file}`)).json();
  const files = ["config.json", "tokenizer.json", "tokenizer_config.json"];
  const [config, tokenizer, settings] = await Promise.all(files.map(read));
  const session = await ort.InferenceSession.create("model/model.onnx");
  const model = { session, config, tokenizer: new Tokenizer(tokenizer, settings) };
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    status.textContent = "Generating …";
    const { prompt, count, temperature } = Object.fromEntries(new FormData(form));
    const names = await generate(model, prompt, Number(count), Number(temperature));
    list.replaceChildren(...names.map((name) => Object.assign(document.createElement("li"), { textContent: name })));
    status.textContent = `${names.length} names`;
    button.disabled = false;
  });
  status.textContent = "Ready";
  button.disabled = false;
} catch (error) {
  status.textContent = `The model cannot be loaded: ${error.message}`;
}

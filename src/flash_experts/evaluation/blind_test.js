"use strict";
// The blind test: scores the marked names, then shows the source of each name.
(() => {
  const form = document.getElementById("blind-test");
  if (!form) return;
  const boxes = [...form.querySelectorAll("input[type=checkbox]")];
  const result = form.querySelector("output");
  const sourceOf = (box) => box.closest("label").querySelector(".source");
  const isReal = (box) => box.dataset.real === "yes";

  // The probability of at least `right` of `all` by chance: a sum of binomial terms, each from the previous one.
  const chanceOf = (right, all) => {
    let term = Math.pow(0.5, all), sum = 0;
    for (let hits = 0; hits <= all; hits++) {
      if (hits >= right) sum += term;
      term *= (all - hits) / (hits + 1);
    }
    return Math.min(1, sum);
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const taken = new Map();
    let right = 0;
    for (const box of boxes) {
      const good = box.checked === isReal(box);
      right += good;
      box.disabled = true;
      box.closest("li").className = good ? "right" : "wrong";
      const source = sourceOf(box);
      source.hidden = false;
      source.textContent = (good ? "✓ " : "✗ ") + source.dataset.source;
      const counts = taken.get(source.dataset.source) || [0, 0];
      counts[0] += box.checked;
      counts[1] += 1;
      taken.set(source.dataset.source, counts);
    }
    const chance = chanceOf(right, boxes.length);
    const lines = [
      `${right} of ${boxes.length} right. Guessing does as well or better in ` +
        (chance < 0.005 ? "fewer than 1" : String(Math.round(100 * chance))) + " of 100 tries.",
    ];
    for (const [source, [marked, all]] of taken) lines.push(`Taken for real: ${marked} of ${all} (${source}).`);
    result.textContent = lines.join("\n");
    form.querySelector("button[type=submit]").disabled = true;
    form.querySelector("button[type=reset]").focus();
  });

  form.addEventListener("reset", () => {
    for (const box of boxes) {
      box.disabled = false;
      box.closest("li").className = "";
      sourceOf(box).hidden = true;
    }
    result.textContent = "";
    form.querySelector("button[type=submit]").disabled = false;
    boxes[0].focus();
  });

  for (const button of form.querySelectorAll("button")) button.hidden = false;
})();

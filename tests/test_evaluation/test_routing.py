"""`flash-experts inspect`: what the router does is what is drawn, and the page is safe."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from flash_experts import GPT2MoEForCausalLM
from flash_experts.cli import main
from flash_experts.data.cards import Card
from flash_experts.data.packing import encode_names
from flash_experts.data.prompts import UNCONDITIONAL, Attributes
from flash_experts.evaluation.routing.maps import RouterMap, inspect_router, read_loads, route
from flash_experts.evaluation.routing.report import format_router, render_router_report
from flash_experts.evaluation.routing.specialization import TOKEN_CLASSES, Tokens
from flash_experts.generation.filters.base import NameVocabulary
from flash_experts.models.router_metrics import router_metrics

FIRST = "Goblin Llanowar Serra Shivan Dark Giant Ancestral Healing Black Lightning".split()
SECOND = "Guide Bolt Elves Angel Dragon Ritual Growth Recall Salve Lotus".split()


def cards_of(count: int) -> list[Card]:
    """Cards whose type and color go by turns."""
    names = [f"{first} {second}" for first in FIRST for second in SECOND][:count]
    kinds = [("Creature", ("R",)), ("Instant", ("U",))]
    return [
        Card(name, kinds[i % 2][0], (), (kinds[i % 2][0],), (), kinds[i % 2][1], i % 4, str(i))
        for i, name in enumerate(names)
    ]


def mixture(dense: GPT2LMHeadModel, **fields: Any) -> GPT2MoEForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_layer_freq": 2} | fields
    model = GPT2MoEForCausalLM.from_dense(dense, **sizes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.weight"):
                parameter.normal_(std=0.5)
    return model


@pytest.fixture
def result(dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> RouterMap:
    cards = cards_of(60)
    return inspect_router(mixture(dense), [card.name for card in cards], cards, tokenizer=tokenizer, shown=3)


# ---------------------------------------------------------------------------------------------------------- routing


ROUTINGS: list[dict[str, Any]] = [
    {},
    {"num_experts_per_tok": 1},
    {"scoring_func": "sigmoid"},
    {"scoring_func": "topk_softmax"},
    {"method": "shared"},
    {"capacity_factor": 0.5},
    {"routing": "expert_choice"},
    {"router_bias_update_rate": 0.001},
]


@pytest.mark.parametrize("fields", ROUTINGS)
def test_what_is_drawn_is_what_the_model_does(
    dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, fields: dict[str, Any]
) -> None:
    """One row of names: loads, pairs and what is left out are those that a training forward of it records."""
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(dense.config, name, 0.0)
    model = mixture(dense, **fields)
    cards = cards_of(30)
    names = [card.name for card in cards]
    found = inspect_router(model, names, cards, tokenizer=tokenizer)
    assert not model.training and found.tokens < 2048
    encoded = encode_names(names, [Attributes.of(card) for card in cards], tokenizer)
    if fields.get("capacity_factor") is None:  # a capacity changes what the next layers read in training
        from flash_experts.data.packing import pack

        model.train()(**pack(encoded).inputs_with_loss(1))
        recorded = router_metrics(model)
        for block in found.blocks:
            expected = {k.split("/")[2]: v for k, v in recorded.items() if k.startswith(f"router/{block.block}/load_")}
            expected |= {name: recorded[f"router/{block.block}/{name}"] for name in block.metrics}
            assert block.metrics == pytest.approx(expected, abs=1e-4)
            loads = [recorded[f"router/{block.block}/load/{expert}"] for expert in range(4)]
            assert block.load == pytest.approx(loads, abs=1e-3)
    first = found.maps[0]
    assert len(first.tokens) == encoded[0].num_inputs and list(first.experts) == [1, 3]
    top_k = model.config.num_experts_per_tok
    for block in found.blocks:
        taken = first.experts[block.block]
        if model.config.routing == "expert_choice":
            assert 0.0 <= block.metrics["untaken_rate"] < 1.0
        else:
            assert all(len(experts) == top_k for experts in taken)
        if model.config.capacity_factor is not None:
            assert 0.5 <= block.metrics["drop_rate"] < 1.0, "places for half of the choices"
        if model.config.routing == "token_choice":
            assert all(sum(gate for _, gate in experts) == pytest.approx(1, abs=1e-3) for experts in taken)
    untaken = any(not experts for each in found.maps for row in each.experts.values() for experts in row)
    assert (">–</td>" in render_router_report(found)) == untaken


def test_experts_are_those_of_the_model_and_no_logits_are_computed(
    dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = mixture(dense)
    encoded = encode_names(["Goblin Guide", "Black Lotus", "Jötun Grunt"], [UNCONDITIONAL] * 3, tokenizer)

    def refuse(*_: Any) -> None:
        raise AssertionError("the head was asked")

    handle = model.lm_head.register_forward_hook(refuse)
    routing = route(model, encoded, tokens_per_batch=20)
    handle.remove()
    start = 0
    for name in encoded:
        logits = model(torch.tensor([name.ids[:-1]]), output_router_logits=True).router_logits
        for block, logits_TE in zip(routing, logits, strict=True):
            expected = torch.zeros_like(logits_TE).scatter(1, logits_TE.topk(2).indices, 1.0).bool().numpy()
            assert np.array_equal(block.chosen_TE[start : start + name.num_inputs], expected)
        start += name.num_inputs


def test_a_model_made_to_send_a_type_to_expert_1_shows_it(
    dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Weights by least squares: names of creatures get the highest logit for expert 1, of others for 0, 2 or 3."""
    model = mixture(dense, num_experts_per_tok=1)
    kinds = {"Creature": ("Goblin Guide", "Llanowar Elves"), "Instant": ("Lightning Bolt", "Dark Ritual")}
    cards = [Card(name, kind, (), (kind,), (), (), None, "") for kind, two in kinds.items() for name in two * 10]
    names = [card.name for card in cards]
    encoded = encode_names(names, [UNCONDITIONAL] * len(names), tokenizer)
    router = model.transformer.h[1].mlp.router
    inputs: list[torch.Tensor] = []
    handle = router.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    route(model, encoded)
    handle.remove()
    is_creature = [card.types == ("Creature",) for card in cards]
    other = torch.tensor([0, 2, 3])
    expert_T = torch.tensor(
        [1 if is_creature[i] else other[at % 3] for i, name in enumerate(encoded) for at in range(name.num_inputs)]
    )
    wanted_TE = torch.eye(4)[expert_T]
    with torch.no_grad():
        router.weight.copy_(torch.linalg.lstsq(torch.cat(inputs), wanted_TE).solution.T)
    found = inspect_router(model, names, cards, prompted=False, tokenizer=tokenizer)
    by_type = {each.block: each for each in found.specializations if each.title == "card type"}
    assert by_type[1].groups == ("Creature", "Instant") and by_type[1].is_specialized
    assert by_type[1].share[0][1] > 0.8 > 0.2 > by_type[1].share[1][1]
    assert by_type[1].information > 0.4 > 4 * by_type[1].shuffled


def test_tokens_and_their_classes(tokenizer: PreTrainedTokenizerFast, dense: GPT2LMHeadModel) -> None:
    encoded = encode_names(["Jötun, Grunt"], [Attributes.parse("Creature", "R", 3)], tokenizer)
    tokens = Tokens.of(encoded, NameVocabulary(tokenizer, len(tokenizer)).prompt_texts)
    assert tokens.texts[0] == "[BOS]" and "".join(tokens.texts[1:]).startswith("creature,·red,·3:·J")
    shown = "".join(tokens.texts[encoded[0].prompt_length :])
    assert shown in ("·Jötun,·Grunt", "·J\\xc3\\xb6tun,·Grunt"), "bytes of half a letter can be printed"
    shown.encode("utf-8")
    classes = [TOKEN_CLASSES[kind] for kind in tokens.class_T]
    assert classes[0] == "BOS token" and classes[1 : encoded[0].prompt_length] == ["prompt"] * (
        encoded[0].prompt_length - 1
    )
    in_name = list(zip(tokens.texts, classes, tokens.place_T.tolist(), strict=True))[encoded[0].prompt_length :]
    assert [place for *_, place in in_name] == list(range(len(in_name)))
    assert in_name[0][1] == "word start" and ("," in dict((t, c) for t, c, _ in in_name))
    for text, kind, _ in in_name:
        assert kind == ("punctuation" if text == "," else "word start" if text.startswith("·") else "continuation")


# --------------------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """What a page asks for from elsewhere, its ids and links, and whether its tags are closed."""

    VOID = ("meta", "input", "br", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.foreign: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "data", "action", "poster") and not str(value).startswith("#"):
                self.foreign.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.foreign.append(name)
            if name == "id":
                self.ids.append(str(value))
            if name == "href":
                self.links.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_from_elsewhere(result: RouterMap) -> None:
    text = render_router_report(result)
    page = Page(text)
    assert not page.open and not page.foreign
    assert not {"script", "link", "img", "iframe", "object"} & page.tags
    assert not re.search(r"https?:|//|@import|url\(", text)
    assert len(set(page.ids)) == len(page.ids)
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    assert "Unofficial Fan Content" in text


def test_every_color_stands_beside_its_number(result: RouterMap) -> None:
    text = render_router_report(result)
    cells = re.findall(r'<td class="(?:heat|t )[^>]*>(.*?)</td>', text, flags=re.S)
    assert len(cells) > 100 and all(re.search(r"[\d·–]", cell) for cell in cells)
    for each in result.maps:
        for block, experts_of_tokens in each.experts.items():
            for experts in experts_of_tokens:
                assert f">{' '.join(str(expert) for expert, _ in experts)}<small>" in text, block


def test_names_are_escaped(dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    evil = '<script>alert("x")</script>\'"&'
    text = render_router_report(inspect_router(mixture(dense), [evil, "Sol Ring"], tokenizer=tokenizer))
    page = Page(text)
    assert "script" not in page.tags and not page.open
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in text


def test_labels_with_few_names_are_listed_as_left_out(
    dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    cards = cards_of(3)
    found = inspect_router(mixture(dense), [card.name for card in cards], cards, tokenizer=tokenizer)
    assert "card type" in found.left_out_labels and "color" in found.left_out_labels
    assert "card type: too few tokens" in render_router_report(found) and "card type: too few" in format_router(found)


def test_trouble_is_shown_with_its_setting(dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model = mixture(dense, num_experts_per_tok=1, router_aux_loss_coef=0.0)
    with torch.no_grad():
        model.transformer.h[3].ln_2.bias.fill_(9.0)
        model.transformer.h[3].mlp.router.weight[2].fill_(9.0)
    cards = cards_of(100)
    found = inspect_router(model, [card.name for card in cards], cards, tokenizer=tokenizer)
    assert found.blocks[1].trouble is not None and found.blocks[1].load[2] == pytest.approx(4.0)
    assert "set router_aux_loss_coef (now 0)" in render_router_report(found)
    assert "block 3: its router has collapsed" in format_router(found)


def test_loads_of_a_training(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_loads(path) is None
    path.write_text('{"event": "train", "step": 1, "loss": 3.0}\n[1]\n', "utf-8")
    assert read_loads(path) is None, "of a dense model"
    path.write_text('{"event": "train", "step": 1, "router/1/load/0": NaN, "router/1/load/1": 1e999}\n', "utf-8")
    assert read_loads(path) is None, "JSON and page have numbers only"
    lines = [{"step": step, "router/1/load/0": step / 10, "router/1/load/1": 2 - step / 10} for step in range(1, 25)]
    lines.append(lines[4] | {"router/1/load/0": 99.0, "router/1/load/1": 1.0})  # step 5 again, after a resume
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 25, "router/1/lo', "utf-8")
    loads = read_loads(path)
    assert loads is not None and loads.steps == tuple(range(2, 25, 2))
    assert loads.loads[1][0] == pytest.approx((0.15, 1.85)) and loads.loads[1][2] == pytest.approx((49.8, 1.2))


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def folder(dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A dense model, one with experts and a record of its training, and prepared data."""
    disable_progress_bar()  # as the command does before transformers is imported
    for name, model in (("dense", dense), ("moe", mixture(dense))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    record = [{"event": "train", "step": i, **{f"router/1/load/{e}": 1.0 for e in range(4)}} for i in (1, 2)]
    (tmp_path / "moe" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in record), "utf-8")
    (tmp_path / "data").mkdir()
    lines = "".join(json.dumps(card.to_json()) + "\n" for card in cards_of(60))
    (tmp_path / "data" / "validation.jsonl").write_text(lines, "utf-8")
    return tmp_path


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    common = [str(folder / "moe"), "--data", str(folder / "data"), "--out", str(folder / "out" / "page.html")]
    assert main(["inspect", *common, "--count", "50", "--show", "2"]) == 0
    printed = capsys.readouterr().out
    assert "50 names" in printed and "load: entropy" in printed and "page.html" in printed
    numbers = json.loads((folder / "out" / "page.json").read_text("utf-8"))
    page = (folder / "out" / "page.html").read_text("utf-8")
    assert [block["block"] for block in numbers["blocks"]] == [1, 3] and len(numbers["maps"]) == 2
    assert numbers["training"]["steps"] == [1, 2] and "During training" in page
    assert all(each["name"] in page for each in numbers["maps"])

    (folder / "names.txt").write_text("Goblin Guide\n\nJötun Grunt\n", "utf-8")
    assert main(["inspect", *common, "--names", str(folder / "names.txt"), "--json", "--overwrite"]) == 0
    named = json.loads(capsys.readouterr().out)
    assert named == json.loads((folder / "out" / "page.json").read_text("utf-8"))
    assert [each["name"] for each in named["maps"]] == ["Goblin Guide", "Jötun Grunt"]
    assert named["maps"][0]["tokens"][:2] == ["[BOS]", ":"], "names without cards are unconditional"

    monkeypatch.chdir(folder / "out")
    before = sorted(Path().iterdir())
    assert main(["inspect", *common[:-2], "--names", str(folder / "names.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == named and sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/dense"], "has no experts, so no router: give an MoE model from upcycle or train"),
        (["{}/dense", "--data", "{}/nothing"], "has no experts, so no router"),
        (["{}/nowhere"], "no model at"),
        (["{}/moe", "--split", "tset"], "no split 'tset'"),
        (["{}/moe", "--data", "{}/nothing"], "run `flash-experts prepare"),
        (["{}/moe", "--names", "{}/nothing"], "cannot read the names"),
        (["{}/moe", "--names", "{}/long.txt"], "the model's context has 64: shorten it"),
        (["{}/moe", "--count", "0"], "--count must be 1 or more"),
        (["{}/moe", "--show", "-1"], "--show must be 0 or more"),
        (["{}/moe", "--out", "{}/long.txt/page.html"], "cannot write"),
    ],
)
def test_errors_are_one_line(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "long.txt").write_text("x" * 90, "utf-8")
    defaults = ["--data", str(folder / "data"), "--out", str(folder / "page.html")]
    assert main(["inspect", *defaults, *(argument.format(folder) for argument in arguments)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("flash-experts inspect: ")


def test_one_expert_is_nothing_to_choose(dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model = GPT2MoEForCausalLM.from_dense(dense, 1, 1, 2)
    with pytest.raises(ValueError, match="one expert in each layer"):
        inspect_router(model, ["Sol Ring"], tokenizer=tokenizer)

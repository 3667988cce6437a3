"""The model card: read back with the Hub's own library, complete, equal for equal records, and inert."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from tests.training.fake_runs import STATIC, FakeRun, write_fake_run

from aiether.training.report import write_cards
from aiether.training.report.markdown import code, plain

EVIL = "`</a>` <script>alert(1)</script> | [x](javascript:0)\n# heading\n---\n``two``"


def finished_run(folder: Path, name_in_config: str = "recommended", source: str = "a book") -> Path:
    write_fake_run(folder, FakeRun(name_in_config=name_in_config))
    write_fake_run(folder / "baseline-static", STATIC)
    data = {"source": source, "fingerprint": "f" * 64, "documents": 12345}
    environment = {"aiether": "0.1.0", "torch": "2.13.0", "data": data}
    (folder / "environment.json").write_text(json.dumps(environment))
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"context_length": 128, "seed": 7}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for arm in (folder, folder / "baseline-static"):
        (arm / "final").mkdir()
        save_file({"a": torch.zeros(300, 40), "b": torch.zeros(345)}, arm / "final" / "model.safetensors")
        (arm / "final" / "config.json").write_text(
            json.dumps({"architectures": ["GPT2LMHeadModel"], "vocab_size": 2048})
        )
    return folder


def test_the_card_says_what_the_model_is_and_what_it_cost(tmp_path: Path) -> None:
    paths = write_cards(finished_run(tmp_path / "my-run"))
    assert paths == tuple(tmp_path / "my-run" / arm / "final/README.md" for arm in (".", "baseline-static"))
    card = ModelCard.load(paths[0])
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "model_name": "my-run",
        "tags": ["aiether", "pretrained-from-scratch", "progressive-growth"],
    }
    for fact in (
        "Grew twice, from 2 to 8",
        "| parameters | 12,345 |",
        "| trained on | `a book` |",
        f"| data fingerprint | `{'f' * 64}` |",
        "| context | 128 tokens |",
        "| 500 | 2 to 4 | 3.312 | 4.880 | `stack, geometric: 0-1 +0-1` |",
        "| tokens seen | 4.1 M in 2,000 steps |",
        "| `seed` | `7` |",
        "nats below the static model",
        "| torch | `2.13.0` |",
        "AutoModelForCausalLM.from_pretrained(folder)",
    ):
        assert fact in card.text.replace("\N{NO-BREAK SPACE}", " "), fact
    assert re.search(r"\| held-out loss \| \d\.\d{3} nats per token \|", card.text)
    assert re.search(r"\| held-out bits per byte \| \d\.\d{3} \|", card.text)
    static = ModelCard.load(paths[1])
    assert static.data.to_dict()["model_name"] == "my-run-static"
    assert "It did not grow." in static.text
    assert "| `trigger` | `never` |" in static.text
    assert "How it grew" not in static.text


def test_equal_records_give_an_equal_card(tmp_path: Path) -> None:
    cards = [write_cards(finished_run(tmp_path / place / "run"))[0].read_bytes() for place in "ab"]
    assert cards[0] == cards[1]
    assert not list(tmp_path.rglob(".README*"))


def test_what_a_user_wrote_stays_text(tmp_path: Path) -> None:
    (path, _) = write_cards(finished_run(tmp_path / "a: b # [c] <i>", name_in_config=EVIL, source=EVIL))
    card = ModelCard.load(path)
    assert card.data.to_dict()["model_name"] == "a: b # [c] <i>"
    assert len([line for line in card.text.splitlines() if line.startswith("# ")]) == 1
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", card.text)
    for piece in ("<script", "javascript:", "</a>", "<i>"):
        assert piece in card.text
        assert piece not in outside


@pytest.mark.parametrize("text", ["plain", "a`b", "``", "`", "x ``` y"])
def test_a_code_span_outlasts_the_backticks_in_it(text: str) -> None:
    fence = re.match("`+", code(text))
    assert fence is not None
    assert code(text).endswith(fence[0])
    assert fence[0] not in re.findall("`+", text)
    assert plain("<b>*x*</b>") == "\\<b\\>\\*x\\*\\</b\\>"


def test_an_unfinished_run_has_no_card(tmp_path: Path) -> None:
    assert write_cards(write_fake_run(tmp_path, FakeRun(interrupted_at=700))) == ()

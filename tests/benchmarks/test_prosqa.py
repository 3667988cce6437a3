"""ProsQA problems have one answer, and the benchmark's rows say what the problem says."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def data() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("prosqa_data")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def script(data: ModuleType) -> ModuleType:
    return importlib.import_module("prosqa")


@pytest.fixture(scope="module")
def problems(data: ModuleType) -> list:
    return data.training_problems(200, seed=3, kept_out=set())


def test_each_problem_has_one_answer_a_shortest_path_and_no_cycle(data: ModuleType, problems: list) -> None:
    for each in problems:
        reached = data.distances(data.successors(each.edges), each.path[0])
        assert reached[each.path[-1]] == each.hops
        assert data.one_answer(each)
        assert not data.has_cycle(each.edges)
        assert len(set(each.edges)) == len(each.edges) <= data.MOST_EDGES
        heads = {b for _, b in each.edges}
        assert all((word in data.NAMES) == (node not in heads) for node, word in enumerate(each.symbols))
        other = next(node for node in (0, 1) if node != each.path[0])
        assert each.negative in data.distances(data.successors(each.edges), other)


def test_problems_look_like_the_given_ones(data: ModuleType, problems: list) -> None:
    """Against figures of the 800 given validation and test questions."""
    found = data.statistics(problems)
    assert found["nodes"] == pytest.approx(22.8, abs=0.5)
    assert found["edges"] == pytest.approx(36.0, abs=1.5)
    assert found["people"] == pytest.approx(2.56, abs=0.25)
    assert found["hops"][3] == pytest.approx(0.41, abs=0.08)
    assert found["target_offered_first"] == pytest.approx(0.5, abs=0.1)
    assert found["out_degrees"] == pytest.approx([0.323, 0.236, 0.180, 0.133, 0.078, 0.034], abs=0.04)
    assert found["in_degrees"] == pytest.approx([0.112, 0.437, 0.278, 0.122, 0.038, 0.010], abs=0.03)
    first = Counter(each.edges.index(min(each.edges)) // 12 for each in problems)
    assert first[0] < 0.6 * len(problems)  # the order of the facts says nothing
    words = Counter(word for each in problems for word in each.symbols)
    assert len(words) == len(data.NAMES) + len(data.CONCEPTS)


def test_text_and_tokens_are_the_same_and_files_are_read_back(data: ModuleType, problems: list) -> None:
    for each in problems:
        row = data.as_json(each)
        assert data.from_json(json.loads(json.dumps(row))) == each
        for text in (row["question"], row["answer"], *row["steps"]):
            assert data.decode(data.encode(text)) == text
    with pytest.raises(ValueError, match="'dog' is no word"):
        data.encode("Every dog is a lempus.")


def test_what_is_kept_out_is_kept_out_in_other_words_too(data: ModuleType, problems: list) -> None:
    some = data.training_problems(20, seed=3, kept_out=set())
    order = random.Random(0)
    disguised = []
    for each in some[:10]:
        place = order.sample(range(len(each.symbols)), len(each.symbols))
        words = dict(zip(place, data.CONCEPTS, strict=False))
        edges = order.sample([(place[a], place[b]) for a, b in each.edges], len(each.edges))
        path, options = (tuple(place[node] for node in nodes) for nodes in (each.path, each.options[::-1]))
        disguised.append(
            data.Problem(tuple(words[n] for n in range(len(place))), tuple(edges), path, options)
        )
    kept_out = {data.signature(each) for each in disguised}
    assert data.training_problems(10, seed=3, kept_out=kept_out) == some[10:]
    assert len({data.signature(each) for each in problems}) == len(problems)


def test_a_question_without_its_first_fact_is_repaired_or_left_out(data: ModuleType, problems: list) -> None:
    whole = problems[0]
    cut = replace(whole, edges=tuple(edge for edge in whole.edges if edge != whole.path[:2]))
    assert not data.one_answer(cut)
    fixed = data.repaired(cut)
    assert set(fixed.edges) == set(whole.edges)
    both = (*cut.edges, (whole.path[1], whole.negative))
    assert data.repaired(replace(cut, edges=both)) is None


def test_rows_say_what_the_problems_say(data: ModuleType, script: ModuleType, problems: list) -> None:
    rows = data.as_tensors(problems)
    for left_out in (0, 2, 4, 6):
        made = script.training_rows(rows, torch.full((len(problems),), left_out), pauses=3)
        for each, tokens, labels in zip(problems, made["input_ids"], made["labels"], strict=True):
            told = data.as_json(each)
            first = "" if left_out >= each.hops else f"<skip {left_out}> "
            steps = [*told["steps"][left_out:], "###", told["answer"]]
            assert data.decode(tokens.tolist()) == f"{told['question']} {first}{' '.join(steps)}"
            scored = labels[labels != -100]
            assert torch.equal(scored, tokens[labels != -100])
            expected = data.encode(" ".join(steps))
            assert scored.tolist() == (expected if first else expected[1:])
            assert (tokens == data.PAUSE).sum() == 3


def test_other_words_are_the_same_problem(data: ModuleType, script: ModuleType, problems: list) -> None:
    rows = data.as_tensors(problems[:50])
    made = script.reworded(rows, torch.Generator().manual_seed(0))
    changed = 0
    for before, edges, path, options in zip(
        problems, made["edges"], made["path"], made["options"], strict=False
    ):
        facts = [tuple(edge) for edge in edges.tolist() if edge[0] != data.PAD]
        places = {token: node for node, token in enumerate(sorted({t for edge in facts for t in edge}))}
        again = data.Problem(
            tuple(data.VOCABULARY[token] for token in places),
            tuple((places[a], places[b]) for a, b in facts),
            tuple(places[token] for token in path.tolist() if token != data.PAD),
            tuple(places[token] for token in options.tolist()),
        )
        assert data.signature(again) == data.signature(before)
        assert {w in data.NAMES for w in before.symbols} == {w in data.NAMES for w in again.symbols}
        changed += [data.INDEX[before.symbols[a]] for a, _ in before.edges] != [a for a, _ in facts]
    assert changed == 50
    swapped = made["options"][:, 0] == made["path"].gather(1, script.hops_of(made)[:, None])[:, 0]
    was = torch.tensor([each.options[0] == each.path[-1] for each in problems[:50]])
    assert 0 < (swapped != was).sum() < 50


@pytest.mark.parametrize("arm", ["none", "pause", "latent", "steps"])
def test_answers_are_scored(data: ModuleType, script: ModuleType, problems: list, arm: str) -> None:
    """Who writes the right reply is right; who names the other concept, or comes to no answer, is wrong."""
    rows = data.as_tensors(problems[:40])
    target = rows["path"].long().gather(1, script.hops_of(rows)[:, None])
    other = rows["options"].long().sum(-1, keepdim=True) - target
    asked = script.question(rows).shape[1] + (3 if arm == "pause" else 0)
    right = script.reply(rows, torch.full((40,), 0 if arm == "steps" else 6))
    answer = (right == data.ANSWER).int().argmax(-1, keepdim=True)
    wrong, endless = right.scatter(1, answer + 2, other), right.scatter(1, answer, data.STOP)
    wrong_name = right.scatter(1, answer + 1, data.FIRST_CONCEPT)
    planted = [(right, 1, 1), (wrong, 0, 0), (wrong_name, 1, 0)]
    for said, chosen, exact in [*planted, (endless, 0, 0)] if arm == "steps" else planted:
        following = torch.nn.functional.pad(said[:, 1:], (asked, 20), value=data.PAD)

        def body(input_ids: Tensor, following: Tensor = following, **_: object) -> SimpleNamespace:
            state = F.one_hot(following[:, : input_ids.shape[1]], len(data.VOCABULARY)).float()
            thought = torch.arange(input_ids.shape[1]).expand(len(input_ids), -1)
            return SimpleNamespace(last_hidden_state=state, iterations=thought)

        model = SimpleNamespace(model=body, lm_head=lambda state: state)
        found = script.answers(model, rows, arm, pauses=3)
        assert found.chosen.float().mean() == chosen
        assert found.exact.float().mean() == exact
        if chosen:  # the name's place, where the concept is decided
            assert torch.equal(found.iterations, (asked + answer[:, 0] + 1).float())


def test_the_curriculum_is_of_one_answer_and_the_same_for_all(
    script: ModuleType, data: ModuleType, problems: list
) -> None:
    """Later nodes of a path keep their answer; at the end most questions are whole and answered at once."""
    rows = data.as_tensors(problems)
    hops = script.hops_of(rows)
    for progress, most in ((0.0, 1), (0.2, 3), (0.9, 6)):
        asked, left_out = script.lesson("none", progress, rows, torch.Generator().manual_seed(1))
        other, chains = script.lesson("steps", progress, rows, torch.Generator().manual_seed(1))
        assert torch.equal(asked["path"], other["path"])
        assert (chains == 0).all()
        fewer = script.hops_of(asked) < hops
        assert 0.05 < fewer.float().mean() < 0.65
        assert script.hops_of(asked)[fewer].max() <= most
        assert (left_out[fewer] == script.MOST_STEPS).all()
        ends = [each[each > 0][-1] for each in (*asked["path"], *rows["path"])]
        assert ends[: len(hops)] == ends[len(hops) :]
        at_once = (left_out >= hops).float().mean()
        assert at_once == 1 if progress > 0.5 else at_once < 0.8

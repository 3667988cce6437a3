"""ProsQA problems: read, made, checked, and turned into tokens.

    python benchmarks/prosqa_data.py ../shared/data/prosqa        # writes runs/prosqa/prosqa.pt

A problem is a directed graph without cycles. Nodes that nothing leads to are people ("Tom is a lempus."), the
others concepts ("Every lempus is a yumpus."). Asked is which of two concepts a person is: the target can be
reached, the other cannot. Graphs grow as in the paper (Hao et al. 2024, arXiv:2412.06769, appendix): two
roots; each new node hangs below nodes that only the first root reaches, or only the second, or any.

Of the given out-of-distribution files no question states the fact that its answer begins with, so that the
target cannot be reached, and with that fact most reach both concepts. `repaired` adds it and keeps the
questions that then have one answer; `far` are made here, of as many hops and with one answer.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from _machine import about

NAMES = "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren".split()  # noqa: SIM905
CONCEPTS = (  # noqa: SIM905
    "bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus impus jelpus "
    "jompus kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus shumpus sterpus storpus terpus "
    "timpus tumpus vumpus worpus wumpus yerpus yimpus yumpus zhorpus zumpus"
).split()
MOST_EDGES, MOST_STEPS = 54, 6
"""Facts of a question; steps of a chain that is written out."""
SPECIAL = ("<pad>", "<pause>", ".", "Is", "or", "?", "###", *(f"<skip {n}>" for n in range(MOST_STEPS)))
PAD, PAUSE, STOP, IS, OR, ASK, ANSWER, SKIP = range(8)
"""`###` is followed by the answer; `<skip n>`, SKIP + n, by the steps without the first n, then `###`."""
FIRST_NAME, FIRST_CONCEPT = len(SPECIAL), len(SPECIAL) + len(NAMES)
VOCABULARY = (*SPECIAL, *NAMES, *CONCEPTS)
INDEX = {word: number for number, word in enumerate(VOCABULARY)}
PREPARED = Path(__file__).parents[1] / "runs" / "prosqa" / "prosqa.pt"
GIVEN = ("prosqa_valid", "prosqa_test")
OOD = ("ood_7hop", "ood_8hop", "ood_dag", "ood_dense")


@dataclass(frozen=True)
class Problem:
    """A graph and what is asked about it.

    Attributes
    ----------
    symbols: the word of each node.
    edges: (from, to), in the order in which the text states them.
    path: the nodes from the root to the target; one step a hop.
    options: target and negative target, in the order in which the text offers them.
    """

    symbols: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    path: tuple[int, ...]
    options: tuple[int, int]

    @property
    def negative(self) -> int:
        """The concept that is not the answer."""
        return next(node for node in self.options if node != self.path[-1])

    @property
    def hops(self) -> int:
        """Steps from the root to the target."""
        return len(self.path) - 1


# ---- text and tokens


def fact(subject: str, concept: str) -> str:
    """What one edge says."""
    return f"{'' if subject in NAMES else 'Every '}{subject} is a {concept}."


def as_json(problem: Problem) -> dict[str, Any]:
    """A problem as the given files hold it."""
    word = problem.symbols
    facts = [fact(word[a], word[b]) for a, b in problem.edges]
    root, (one, two) = word[problem.path[0]], problem.options
    hops = zip(problem.path, problem.path[1:], strict=False)
    return {
        "question": " ".join([*facts, f"Is {root} a {word[one]} or {word[two]}?"]),
        "answer": f"{root} is a {word[problem.path[-1]]}.",
        "steps": [fact(word[a], word[b]) for a, b in hops],
        "idx_to_symbol": list(word),
        "edges": [list(edge) for edge in problem.edges],
        "root": problem.path[0],
        "target": problem.path[-1],
        "neg_target": problem.negative,
    }


def from_json(row: dict[str, Any]) -> Problem:
    """A problem of a given file; edges and options in the text's order."""
    words = tuple(row["idx_to_symbol"])
    place = {word: node for node, word in enumerate(words)}
    tokens = encode(row["question"])
    facts, asked = tokens[: tokens.index(IS)], tokens[tokens.index(IS) :]
    node = [place.get(VOCABULARY[token], -1) for token in facts]
    edges = tuple((node[at], node[at + 1]) for at in range(0, len(facts), 3))
    reached = [encode(step.partition(",")[0])[1] for step in row["steps"]]  # ", so Tom is a lempus."
    path = (row["root"], *(place[VOCABULARY[token]] for token in reached))
    return Problem(words, edges, path, (place[VOCABULARY[asked[2]]], place[VOCABULARY[asked[4]]]))


def encode(text: str) -> list[int]:
    """Text -> tokens; `Every`, `is` and `a` follow from the words around them and get none.

    "Every lempus is a yumpus." -> lempus yumpus . ; "Is Tom a lempus or yumpus?" -> Is Tom lempus or yumpus ?

    Raises
    ------
    ValueError
        For a word that is not in the vocabulary.
    """
    words = text.replace(".", " .").replace("?", " ?").split()
    kept = [word for word in words if word not in ("Every", "is", "a")]
    unknown = [word for word in kept if word not in INDEX]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is no word of ProsQA: see NAMES and CONCEPTS in {Path(__file__).name}"
        )
    return [INDEX[word] for word in kept]


def decode(tokens: Sequence[int]) -> str:
    """The text of whole sentences: the inverse of `encode`; fillers and pauses say nothing."""
    words = [VOCABULARY[token] for token in tokens if token not in (PAD, PAUSE)]
    said: list[str] = []
    sentence: list[str] = []
    for word in words:
        if word == "###" or word.startswith("<skip"):
            said.append(word)
            continue
        sentence.append(word)
        if word == "." and len(sentence) == 3:
            said.append(fact(*sentence[:2]))
        elif word == "?" and len(sentence) == 6:
            said.append(f"Is {sentence[1]} a {sentence[2]} or {sentence[4]}?")
        elif word not in (".", "?"):
            continue
        else:
            said.append(" ".join(sentence))
        sentence = []
    return " ".join([*said, *sentence])


# ---- graphs


def successors(edges: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Where one step leads from each node that has steps."""
    found: dict[int, list[int]] = {}
    for a, b in edges:
        found.setdefault(a, []).append(b)
    return found


def distances(after: dict[int, list[int]], root: int) -> dict[int, int]:
    """Steps from the root to each node that it reaches, by breadth first."""
    found, queue = {root: 0}, [root]
    for node in queue:
        for following in after.get(node, ()):
            if following not in found:
                found[following] = found[node] + 1
                queue.append(following)
    return found


def one_answer(problem: Problem) -> bool:
    """Whether the facts lead along the path to the target, and never to the other concept."""
    steps = set(zip(problem.path, problem.path[1:], strict=False))
    reached = distances(successors(problem.edges), problem.path[0])
    return steps <= set(problem.edges) and problem.negative not in reached


def has_cycle(edges: Iterable[tuple[int, int]]) -> bool:
    """Whether some node leads back to itself."""
    left = set(edges)
    while left:
        heads = {b for _, b in left}
        kept = {edge for edge in left if edge[0] in heads}
        if kept == left:
            return True
        left = kept
    return False


def signature(problem: Problem) -> str:
    """The same for graphs that differ only in words, in the order of nodes or in the order of facts."""
    after = successors(problem.edges)
    before = successors((b, a) for a, b in problem.edges)
    special = {problem.path[0]: "r", problem.path[-1]: "t", problem.negative: "n"}
    color = {node: special.get(node, "") for node in range(len(problem.symbols))}
    for _ in range(4):
        seen = {
            node: f"{color[node]}>{sorted(color[each] for each in after.get(node, ()))}"
            f"<{sorted(color[each] for each in before.get(node, ()))}"
            for node in color
        }
        rank = {text: str(hash_of(text)) for text in set(seen.values())}
        color = {node: rank[text] for node, text in seen.items()}
    return str(hash_of(" ".join(sorted(color.values()))))


def hash_of(text: str) -> int:
    """A number of 60 bits that is the same in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 4


def grow(size: int, draw: random.Random) -> list[tuple[int, int]]:
    """The edges of a graph of so many nodes, the roots being 0 and 1."""
    label, depth = [1, 2], [0, 0]
    edges: list[tuple[int, int]] = []
    while len(label) < size:
        node = len(label)
        if draw.random() < NEW_PERSON:
            label.append(0)
            depth.append(0)
            continue
        side = draw.random()
        allowed = {0, 1} if side <= SIDE else {0, 2} if side <= 2 * SIDE else {0, 1, 2, 3}
        candidates = [each for each in range(node) if label[each] in allowed]
        count = min(len(candidates), _parents(draw))
        chosen: set[int] = set()
        while len(chosen) < count:
            chosen.add(draw.choices(candidates, [depth[each] * DEEPER + 1 for each in candidates])[0])
        edges.extend((each, node) for each in sorted(chosen))
        joined = 0
        for each in chosen:
            joined |= label[each]
        label.append(joined)
        depth.append(1 + max(depth[each] for each in chosen))
    return edges


NEW_PERSON, SIDE, PARENTS, DEEPER = 0.04, 0.35, 1.4, 1.5
"""The share of nodes that nothing leads to; of those below one root only; mean of the draws of parents."""


def _parents(draw: random.Random) -> int:
    """Poisson, without 0."""
    while True:
        count, left = 0, draw.expovariate(1.0)
        while left < PARENTS:
            count += 1
            left += draw.expovariate(1.0)
        if count:
            return count


HOPS = {3: 0.407, 4: 0.438, 5: 0.131, 6: 0.024}
"""Shares of the numbers of hops in the given sets."""
SIZE = (22.8, 1.8)
"""Nodes of a graph: mean and standard deviation."""


def make(draw: random.Random, hops: int, size: tuple[float, float] = SIZE) -> Problem:
    """A problem of so many hops; target and negative target are leaves that one root reaches alone."""
    while True:
        number = round(draw.gauss(*size))
        if not MOST_STEPS < number <= len(CONCEPTS):
            continue
        edges = grow(number, draw)
        if len({node for edge in edges for node in edge}) < number or len(edges) > MOST_EDGES:
            continue  # somebody of whom nothing is said, or too long a text
        after, root = successors(edges), draw.randrange(2)
        mine, other = distances(after, root), distances(after, 1 - root)
        leaves = [node for node in range(number) if node not in after]
        targets = [node for node in leaves if node not in other and node in mine]
        negatives = [node for node in leaves if node in other and node not in mine]
        furthest = max((mine[node] for node in targets), default=0)
        if negatives and furthest == hops:
            target = draw.choice([node for node in targets if mine[node] == furthest])
            return _asked(edges, number, root, target, draw.choice(negatives), draw)


def _asked(
    edges: list[tuple[int, int]], number: int, root: int, target: int, negative: int, draw: random.Random
) -> Problem:
    """Words, the order of the facts and a shortest path."""
    heads = {b for _, b in edges}
    people = [node for node in range(number) if node not in heads]
    names, concepts = draw.sample(NAMES, len(people)), draw.sample(CONCEPTS, number - len(people))
    words = [names.pop() if node in people else concepts.pop() for node in range(number)]
    draw.shuffle(edges)
    path, before = [target], successors((b, a) for a, b in edges)
    far = distances(successors(edges), root)
    while path[-1] != root:
        near = far[path[-1]] - 1
        path.append(draw.choice([each for each in before[path[-1]] if far.get(each) == near]))
    options = (target, negative) if draw.random() < 0.5 else (negative, target)
    return Problem(tuple(words), tuple(edges), tuple(reversed(path)), options)


def repaired(problem: Problem) -> Problem | None:
    """The question with the fact that its answer begins with; None if it still has not one answer."""
    edges, lacking = problem.edges, (problem.path[0], problem.path[1])
    if lacking not in edges:
        middle = len(edges) // 2
        edges = (*edges[:middle], lacking, *edges[middle:])
    whole = Problem(problem.symbols, edges, problem.path, problem.options)
    return whole if one_answer(whole) and len(edges) <= MOST_EDGES else None


# ---- files


def read(folder: Path, name: str) -> list[Problem]:
    """The problems of one given file."""
    return [from_json(row) for row in json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))]


def as_tensors(problems: Sequence[Problem]) -> dict[str, Tensor]:
    """uint8: `edges` (n, MOST_EDGES, 2), filled up in front; `path` (n, 10), behind; `options` (n, 2)."""
    edges = torch.zeros(len(problems), MOST_EDGES, 2, dtype=torch.uint8)
    path = torch.zeros(len(problems), 10, dtype=torch.uint8)
    for row, problem in enumerate(problems):
        token = [INDEX[word] for word in problem.symbols]
        edges[row, -len(problem.edges) :] = torch.tensor([[token[a], token[b]] for a, b in problem.edges])
        path[row, : len(problem.path)] = torch.tensor([token[node] for node in problem.path])
    options = [[INDEX[problem.symbols[node]] for node in problem.options] for problem in problems]
    return {"edges": edges, "path": path, "options": torch.tensor(options, dtype=torch.uint8)}


def training_problems(count: int, seed: int, kept_out: set[str]) -> list[Problem]:
    """Problems none of whose graphs is one of those kept out, whatever its words and order."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        hops = draw.choices(list(HOPS), list(HOPS.values()))[0]
        problem = make(draw, hops)
        if signature(problem) not in kept_out:
            found.append(problem)
    return found


def far_problems(count: int, hops: int, size: tuple[float, float], seed: int) -> list[Problem]:
    """Problems of more hops than in training, of larger graphs."""
    draw = random.Random(seed)
    return [make(draw, hops, size) for _ in range(count)]


def evaluation_sets(folder: Path, far: int) -> dict[str, list[Problem]]:
    """All that is evaluated on: given, repaired, and further ones that are made here."""
    sets = {name: read(folder, name) for name in (*GIVEN, *OOD)}
    for name in OOD:
        sets[f"{name}_repaired"] = [fixed for each in sets[name] if (fixed := repaired(each))]
    if far:
        sets["far_7hop"] = far_problems(far, 7, (29, 3), seed=7)
        sets["far_8hop"] = far_problems(far, 8, (31, 3), seed=8)
    return sets


def statistics(problems: Sequence[Problem]) -> dict[str, Any]:
    """What a set looks like: means, shares of hops, of steps from and to a node, of options."""
    ahead, back, furthest = Counter[int](), Counter[int](), 0
    for problem in problems:
        after = successors(problem.edges)
        before = successors((b, a) for a, b in problem.edges)
        ahead.update(len(after.get(node, ())) for node in range(len(problem.symbols)))
        back.update(len(before.get(node, ())) for node in range(len(problem.symbols)))
        furthest += problem.hops == max(distances(after, problem.path[0]).values(), default=0)
    nodes, hops = ahead.total(), Counter(problem.hops for problem in problems)
    return {
        "problems": len(problems),
        "nodes": fmean(len(problem.symbols) for problem in problems),
        "people": fmean(len(set(problem.symbols) & set(NAMES)) for problem in problems),
        "edges": fmean(len(problem.edges) for problem in problems),
        "hops": {number: hops[number] / len(problems) for number in sorted(hops)},
        "out_degrees": [ahead[number] / nodes for number in range(6)],
        "in_degrees": [back[number] / nodes for number in range(6)],
        "target_is_furthest": furthest / len(problems),
        "target_offered_first": fmean(each.options[0] == each.path[-1] for each in problems),
        "one_answer": fmean(one_answer(each) for each in problems),
        "with_cycle": fmean(has_cycle(each.edges) for each in problems),
    }


def prepare(folder: Path, count: int, far: int, seed: int) -> dict[str, Any]:
    """Training problems, evaluation sets and the statistics of all."""
    sets = evaluation_sets(folder, far)
    kept_out = {signature(each) for problems in sets.values() for each in problems}
    train = training_problems(count, seed, kept_out)
    shown = {name: statistics(problems) for name, problems in {"train": train, **sets}.items()}
    evaluation = {name: as_tensors(problems) for name, problems in sets.items()}
    return {"train": as_tensors(train), "evaluation": evaluation, "statistics": shown, **about(seeds=[seed])}


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder that holds prosqa_valid.json and the others")
    parser.add_argument("--count", type=int, default=100_000, help="training problems")
    parser.add_argument("--far", type=int, default=500, help="problems of 7 and of 8 hops")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=PREPARED)
    arguments = parser.parse_args()
    prepared = prepare(arguments.data, arguments.count, arguments.far, arguments.seed)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = arguments.output.with_suffix(".unfinished")
    torch.save(prepared, unfinished)
    unfinished.replace(arguments.output)
    for name, figures in prepared["statistics"].items():
        print(f"{name}:")
        for what, figure in figures.items():
            print(f"  {what}: {_short(figure)}")


def _short(figure: Any) -> str:
    if isinstance(figure, float):
        return f"{figure:.3f}"
    if isinstance(figure, list):
        return " ".join(f"{each:.3f}" for each in figure)
    if isinstance(figure, dict):
        return ", ".join(f"{key}: {each:.3f}" for key, each in figure.items())
    return str(figure)


if __name__ == "__main__":
    main()

"""Hops along a cycle: the node k steps after a node, from edges in random order (the depth task of arXiv 2512.17351).

A sequence has the edges of one directed cycle, then queries. A query is a number of steps k and a node x. The answer is the node
k steps after x.

    BOS  | c a | a b | b c  2 a 1 c         targets c and a, each at the node of its query

A separator stands before each edge. Without it, a node that ends one edge and starts the next would be ambiguous. Steps and nodes
have separate tokens. One more separator stands before the queries if the length leaves a token over.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cat.config import Count
from cat.tasks.base import IGNORE, Examples, Task, draw_distinct

BOS, SEPARATOR = 0, 1
FIRST_STEP = 2


class Hops(Task):
    """Hops along a cycle. The numbers of nodes and of queries grow with the length, so that sequences stay full."""

    example: ClassVar = {"hops": (1, 2, 3), "nodes": 9, "alphabet": 19}
    kind: Literal["hops"]
    hops: Annotated[tuple[Count, ...], Field(min_length=1, strict=False)]
    """The numbers of steps k, ascending. Each query has one of them, all equally often."""
    nodes: Count
    """Nodes of the cycle at the training length; at other lengths proportionally many (`nodes_at`)."""
    alphabet: Count
    """Number of distinct node tokens; each cycle is drawn from them."""

    @model_validator(mode="after")
    def _check_hops(self) -> Self:
        if list(self.hops) != sorted(set(self.hops)):
            raise ValueError(f"hops = {list(self.hops)} must be ascending, each number once")
        for length in self.generated_lengths:
            nodes = self.nodes_at(length)
            if nodes <= self.hops[-1]:
                raise ValueError(f"length {length} has {nodes} nodes, too few for {self.hops[-1]} hops that do not return")
            if nodes > self.alphabet:
                raise ValueError(f"length {length} has {nodes} nodes, more than alphabet = {self.alphabet}")
            if self.queries_at(length) < 1:
                raise ValueError(f"length {length} is too short for {nodes} nodes and a query, which need {3 * nodes + 3} tokens")
        return self

    @property
    def vocabulary(self) -> int:
        return self._first_node + self.alphabet

    @property
    def label(self) -> str:
        return f"{self.hops[0]}-hop cycle" if len(self.hops) == 1 else "hops along a cycle"

    @property
    def _first_node(self) -> int:
        return FIRST_STEP + len(self.hops)

    def nodes_at(self, length: int) -> int:
        """Nodes of the cycle in sequences of `length` tokens."""
        return self.nodes * length // self.length

    def queries_at(self, length: int) -> int:
        """Number of queries in sequences of `length` tokens: they fill the rest after the edges."""
        return (length - 1 - 3 * self.nodes_at(length)) // 2

    def examples(self, split: str, length: int, count: int, generator: np.random.Generator) -> Examples:
        """The splits differ only in their generator."""
        nodes, queries = self.nodes_at(length), self.queries_at(length)
        cycle = draw_distinct(generator, count, nodes, self.alphabet) + self._first_node
        order = generator.permuted(np.broadcast_to(np.arange(nodes), (count, nodes)), axis=1)
        inputs = np.full((count, length), SEPARATOR, dtype=np.int64)
        inputs[:, 0] = BOS
        inputs[:, self._source_columns(length)] = np.take_along_axis(cycle, order, axis=1)
        inputs[:, self._source_columns(length) + 1] = np.take_along_axis(cycle, (order + 1) % nodes, axis=1)

        start = generator.integers(0, nodes, size=(count, queries))
        step = generator.integers(0, len(self.hops), size=(count, queries))
        inputs[:, length - 2 * queries :: 2] = step + FIRST_STEP
        inputs[:, length - 2 * queries + 1 :: 2] = np.take_along_axis(cycle, start, axis=1)
        targets = np.full((count, length), IGNORE, dtype=np.int64)
        end = (start + np.array(self.hops)[step]) % nodes
        targets[:, length - 2 * queries + 1 :: 2] = np.take_along_axis(cycle, end, axis=1)
        return Examples(inputs, targets)

    def answer_positions(self, examples: Examples) -> np.ndarray:
        """At each target position, the position of the answer as the end of the last edge."""
        answers = self.oracle(examples)
        sources = self._source_columns(answers.shape[1])
        ends = np.asarray(examples.inputs)[:, sources + 1]
        positions = np.full(answers.shape, -1)
        rows, targets = np.nonzero(answers >= 0)
        positions[rows, targets] = sources[(ends[rows] == answers[rows, targets][:, None]).argmax(1)] + 1
        return positions

    def oracle(self, examples: Examples) -> np.ndarray:
        """At the node of each query, the node that is k edges further."""
        inputs = np.asarray(examples.inputs, dtype=np.int64)
        sources = self._source_columns(inputs.shape[1])
        successor = np.zeros((len(inputs), self.vocabulary), dtype=np.int64)
        np.put_along_axis(successor, inputs[:, sources], inputs[:, sources + 1], axis=1)
        rows, queries, hops = self._queries(inputs)
        node = inputs[rows, queries]
        for hop in range(1, self.hops[-1] + 1):
            node = np.where(hop <= hops, successor[rows, node], node)
        targets = np.full(inputs.shape, IGNORE, dtype=np.int64)
        targets[rows, queries] = node
        return targets

    @property
    def part_names(self) -> tuple[str, ...]:
        return tuple(f"hops_{count}" for count in self.hops) if len(self.hops) > 1 else ()

    def parts(self, examples: Examples) -> dict[str, np.ndarray]:
        """The answers of each number of hops."""
        rows, queries, hops = self._queries(np.asarray(examples.inputs, dtype=np.int64))
        asked = np.zeros(examples.inputs.shape, dtype=np.int64)
        asked[rows, queries] = hops
        return {name: asked == count for name, count in zip(self.part_names, self.hops, strict=False)}

    @property
    def reference_labels(self) -> dict[str, str]:
        labels = {"any_node": "guess another node of the cycle"}
        if self.hops[0] == 1 < self.hops[-1]:
            labels["successor"] = "answer with the next node, whatever the number of hops"
        if self.hops[-1] > 1:
            labels["one_hop"] = "follow at most one edge; for more hops, guess a node farther away"
        if self.hops[-1] > 2:
            labels["two_hops"] = "follow at most two edges; for more hops, guess a node farther away"
        return labels

    def any_node(self, examples: Examples) -> np.ndarray:
        """Guess any node of the cycle other than that of the query."""
        return self._follow(examples, 0)

    def successor(self, examples: Examples) -> np.ndarray:
        """Answer every query like one with one hop."""
        return (self._follow(examples, 1) == 1).astype(float)

    def one_hop(self, examples: Examples) -> np.ndarray:
        """Answer queries of one hop; else guess any node but that of the query and the next."""
        return self._follow(examples, 1)

    def two_hops(self, examples: Examples) -> np.ndarray:
        """Answer queries of at most two hops; else guess any node but that of the query and the next two."""
        return self._follow(examples, 2)

    def _follow(self, examples: Examples, known: int) -> np.ndarray:
        """The probability to find each answer, N x L, if the nodes up to `known` steps after the query's are known."""
        inputs = np.asarray(examples.inputs, dtype=np.int64)
        rows, queries, hops = self._queries(inputs)
        found = np.zeros(inputs.shape)
        # With all others known, the last node is certain.
        found[rows, queries] = np.where(hops <= known, 1, 1 / max(1, self.nodes_at(inputs.shape[1]) - 1 - known))
        return found

    def _queries(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, position and number of hops of each query; the position is that of its node."""
        rows, steps = np.nonzero((inputs >= FIRST_STEP) & (inputs < self._first_node))
        return rows, steps + 1, np.array(self.hops)[inputs[rows, steps] - FIRST_STEP]

    def _source_columns(self, length: int) -> np.ndarray:
        """The position of the first node of each edge; the second node follows."""
        return 2 + 3 * np.arange(self.nodes_at(length))

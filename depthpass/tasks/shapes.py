"""DAGs in closed form: what an algorithm computes at a size, whatever its input (no problem is drawn).

Where a task has one, ``depthpass report --task`` holds the depth of a program against it; where the path depends on the
data, against the DAG of a drawn instance's trace.
"""

from __future__ import annotations

import math

import networkx as nx

from depthpass.errors import InputError, did_you_mean
from depthpass.tasks.dags import TaskDAG

NODES = 1 << 22
"""Most nodes or edges that are drawn."""


def _positive(bounded: bool = True, **sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: expected an integer of at least 1, got {value!r}.")
    if bounded and math.prod(sizes.values()) > NODES:
        raise InputError(f"{' * '.join(sizes)}: expected at most {NODES}, what a DAG can be drawn for, got "
                         f"{math.prod(sizes.values())}.")


def _tree(n: int) -> nx.DiGraph:
    """Balanced binary reduction of n leaves; an odd node of a level moves up without work."""
    graph = nx.DiGraph()
    level = [("in", i) for i in range(n)]
    graph.add_nodes_from(level)
    height = 0
    while len(level) > 1:
        height += 1
        above = []
        for i in range(0, len(level) - 1, 2):
            node = (height, i // 2)
            graph.add_edges_from([(level[i], node), (level[i + 1], node)])
            above.append(node)
        level = above + level[len(level) - len(level) % 2 :]
    return graph


def _chain(n: int) -> nx.DiGraph:
    """Left-to-right scan of n inputs: state i reads state i-1 and input i."""
    graph = nx.DiGraph()
    for i in range(n):
        graph.add_edge(("in", i), ("state", i))
        if i:
            graph.add_edge(("state", i - 1), ("state", i))
    return graph


def _scan(name: str, n: int, form: str, note: str) -> TaskDAG:
    _positive(n=n)
    if form not in ("tree", "chain"):
        hint = did_you_mean(form, ("tree", "chain"))
        raise InputError(f"{name}: form must be 'tree' or 'chain', got {form!r}.{hint}")
    return TaskDAG(f"{name}({n}, {form})", _tree(n) if form == "tree" else _chain(n), note=note)


def parity(n: int, form: str = "tree") -> TaskDAG:
    """Parity of n bits: depth ceil(log2 n) as a tree, n as a left-to-right scan.

    The problem itself is in TC^0 (constant depth with O(log n) bits per number): neither DAG is a lower bound.
    """
    return _scan("parity", n, form, "one node is an exclusive or of two bits")


def s5_word_problem(n: int, form: str = "tree") -> TaskDAG:
    """Product of n permutations of five things: depth ceil(log2 n) as a tree, n as a left-to-right scan.

    The word problem of S5 is complete for NC1, so constant-depth threshold circuits do not solve it unless TC0 = NC1.
    """
    return _scan("s5_word_problem", n, form, "one node multiplies two permutations of five elements; NC1-complete")


def arithmetic_formula(operators: int, form: str = "balanced") -> TaskDAG:
    """A formula with so many binary operators: depth ceil(log2(operators + 1)) balanced, ``operators`` when nested.

    ``balanced`` is the tree as given when it is balanced; an unbalanced one can be rebalanced to logarithmic depth
    (with larger nodes), ``nested`` evaluates it as written in the worst case.
    """
    _positive(operators=operators)
    if form not in ("balanced", "nested"):
        raise InputError(f"arithmetic_formula: form must be 'balanced' or 'nested', got {form!r}."
                         f"{did_you_mean(form, ('balanced', 'nested'))}")
    if form == "balanced":
        return TaskDAG(f"arithmetic_formula({operators}, balanced)", _tree(operators + 1),
                       note="one node applies a binary operator")
    graph = nx.DiGraph([(("in", 0), ("op", 0))])
    for i in range(operators):
        graph.add_edge(("in", i + 1), ("op", i))
        if i:
            graph.add_edge(("op", i - 1), ("op", i))
    return TaskDAG(f"arithmetic_formula({operators}, nested)", graph, note="one node applies a binary operator")


def edit_distance(n: int, m: int | None = None) -> TaskDAG:
    """Edit distance of strings of length n and m: n*m cells, depth n + m - 1 (cells of the longest path)."""
    m = n if m is None else m
    _positive(n=n, m=m)
    graph = nx.DiGraph()
    graph.add_nodes_from((i, j) for i in range(n) for j in range(m))
    for i in range(n):
        for j in range(m):
            graph.add_edges_from(((a, b), (i, j)) for a, b in ((i - 1, j), (i, j - 1), (i - 1, j - 1))
                                 if a >= 0 and b >= 0)
    return TaskDAG(f"edit_distance({n}, {m})", graph, inputs_are_nodes=False,
                   note="one node is a cell of the dynamic programme; the strings are not nodes")


def reachability(nodes: int, diameter: int | None = None) -> TaskDAG:
    """All-pairs reachability by repeated squaring: depth ceil(log2 d) for paths of up to d edges.

    A node of the DAG is one (i, j) entry of one squaring. It reads whole rows and columns, which uniform attention does
    in one visit (arXiv 2505.18948 keeps n^3 + n^2 pads for it); with bounded fan-in each level costs a further
    ceil(log2 n) rounds.
    """
    _positive(nodes=nodes)
    _positive(edges=2 * nodes**3)
    diameter = max(1, nodes - 1) if diameter is None else diameter
    _positive(diameter=diameter)
    graph = nx.DiGraph()
    squarings = math.ceil(math.log2(max(2, diameter)))
    every = [(i, j) for i in range(nodes) for j in range(nodes)]
    graph.add_nodes_from((0, *e) for e in every)
    for t in range(1, squarings + 1):
        for i, j in every:
            graph.add_edges_from(((t - 1, i, k), (t, i, j)) for k in range(nodes))
            graph.add_edges_from(((t - 1, k, j), (t, i, j)) for k in range(nodes))
    return TaskDAG(f"reachability({nodes}, diameter {diameter})", graph,
                   note="one node is an OR over k of (i,k) and (k,j): unbounded fan-in, one uniform attention read")


def binary_search(n: int) -> TaskDAG:
    """Search among n sorted items: ceil(log2 n) halvings and one final comparison, one after the other.

    This is the worst path: which item a step reads depends on the step before, so nothing runs in parallel.
    """
    _positive(bounded=False, n=n)
    graph = nx.DiGraph()
    steps = math.ceil(math.log2(n)) + 1
    graph.add_node(("compare", 0))
    nx.add_path(graph, [("compare", i) for i in range(steps)])
    return TaskDAG(f"binary_search({n})", graph, inputs_are_nodes=False,
                   note="one node fetches an item and compares it; the items are not nodes")


def word_problem(name: str, n: int, form: str = "tree") -> TaskDAG:
    """Product of n elements of a group: depth ceil(log2 n) as a tree, n as a left-to-right scan."""
    return _scan(name, n, form, "one node multiplies two permutations")


def prefix_scan(n: int, form: str = "chain") -> TaskDAG:
    """All prefix sums: n states in a row, or ceil(log2 n) rounds of doubling strides (n log n nodes)."""
    _positive(n=n)
    if form == "chain":
        return TaskDAG(f"prefix_sums({n}, chain)", _chain(n), note="one node adds two numbers")
    if form != "tree":
        raise InputError(f"prefix_sums: form must be 'tree' or 'chain', got {form!r}.{did_you_mean(form, ('tree', 'chain'))}")
    graph, row = nx.DiGraph(), [("in", i) for i in range(n)]
    graph.add_nodes_from(row)
    stride = 1
    while stride < n:
        new = [(stride, i) for i in range(stride, n)]
        graph.add_edges_from((u, v) for v in new for u in (row[v[1]], row[v[1] - stride]))
        row, stride = row[:stride] + new, 2 * stride
    return TaskDAG(f"prefix_sums({n}, tree)", graph, note="one node adds two numbers")


def pointer_jumps(hops: int, form: str = "hops") -> TaskDAG:
    """p hops along pointers that one attention read finds: p fetches in a row, or ceil(log2 p) doublings of all pointers.

    A node is a fetch of unbounded fan-in: the pointer of a place (its latest earlier occurrence) in one uniform or hard
    attention read. ``doubling`` composes the pointers of every place with themselves and combines the powers of two of p.
    """
    _positive(hops=hops)
    if form not in ("hops", "doubling"):
        raise InputError(f"p_hop: form must be 'hops' or 'doubling', got {form!r}.{did_you_mean(form, ('hops', 'doubling'))}")
    graph = nx.DiGraph()
    if form == "hops":
        nx.add_path(graph, [("hop", i) for i in range(hops)])
        return TaskDAG(f"p_hop({hops}, hops)", graph, inputs_are_nodes=False, note="one node follows one pointer")
    powers = [k for k in range(hops.bit_length()) if hops >> k & 1]
    nx.add_path(graph, [("power", k) for k in range(hops.bit_length())])
    before = None
    for k in powers:  # the product of the powers so far with the next one
        node = ("power", k) if before is None else ("product", k)
        if before is not None:
            graph.add_edges_from([(before, node), (("power", k), node)])
        before = node
    return TaskDAG(f"p_hop({hops}, doubling)", graph, inputs_are_nodes=False,
                   note="one node composes two pointers at every place")

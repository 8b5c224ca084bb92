"""Measures which path of ``ProductPath`` is the fastest on this CPU for each class of products.

One measurement takes less than 0.3 s; its result is cached by CPU model and torch version. It counts the processor time
of a single thread, so that other processes on the same cores, such as other workers that start, do not change it.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import nn

from dpo_ray.data.packing import Span
from dpo_ray.objective.head import Head, softmax
from dpo_ray.objective.head_products import HeadProducts
from dpo_ray.objective.precision import PATHS, ProductPath, Products
from dpo_ray.ops.attention import packed_attention
from dpo_ray.ops.cpu import cpu_model
from dpo_ray.ops.linear import use_products
from dpo_ray.storage import write_atomically

logger = logging.getLogger(__name__)

Timings = Mapping[str, Mapping[ProductPath, float]]
"""Processor seconds by class, a field of ``Products``, and path."""
METHOD = 2
"""Raised when other paths are measured, or in another way: earlier results in a file do not count then."""
TOKENS, FEW_TOKENS = 128, 32
HIDDEN, OUTPUTS, VOCABULARY = 512, 1024, 4096
HEADS, KEY_HEADS, HEAD_SIZE = 6, 2, 64
ATTENTION_ROWS = 3
"""Tokens of attention, in multiples of those of the other classes."""
REPEATS = 5
HOPELESS = 8.0
"""A path that takes this many times as long as the fastest one for few tokens is not measured further."""
MARGIN = 1.05
"""A path must be faster than a more exact one by this factor to be chosen."""


def measure_products() -> Timings:
    """Processor seconds of each path: the least of ``REPEATS`` runs; without hopeless paths."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            return {name: _race(make) for name, make in _TASKS.items()}
    finally:
        torch.set_num_threads(threads)


def fastest(of_ranks: Sequence[Timings]) -> Products:
    """For each class, the path that is the fastest on the slowest of the ranks, among those all of them measured."""
    chosen: dict[str, ProductPath] = {}
    for name in of_ranks[0]:
        common = [path for path in PATHS if all(path in timings[name] for timings in of_ranks)]
        slowest = {path: max(timings[name][path] for timings in of_ranks) for path in common}
        best = min(slowest.values(), default=0.0)
        # PATHS has the most exact one first.
        chosen[name] = next((path for path in common if slowest[path] <= MARGIN * best), "rounded")
    return Products(**chosen)


def cached_timings(folder: Path) -> Timings:
    """``measure_products``, from a file in ``folder`` if this CPU was measured before.

    A file that is damaged or cannot be written is no error.
    """
    file = folder / "cpu_products.json"
    key = f"{cpu_model()}, torch {torch.__version__}, method {METHOD}"
    known = _read(file)
    if key in known:
        return known[key]
    timings = measure_products()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(_read(file) | {key: timings}, indent=1))
    except OSError as error:
        logger.debug("%s: %s", file, error)
    return timings


def describe(products: Products) -> str:
    """One line that names the CPU and the path of each class."""
    paths = ", ".join(f"{name} {path}" for name, path in asdict(products).items())
    return f"matrix products on {cpu_model()}: {paths}"


def _read(file: Path) -> dict[str, Timings]:
    """The cached timings by CPU; none if the file is missing, damaged or of other classes."""
    classes = {field.name for field in fields(Products)}
    try:
        known = json.loads(file.read_text())
        return {key: timings for key, timings in known.items() if set(timings) == classes}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _race(make: Callable[[ProductPath, int], Callable[[], object]]) -> dict[ProductPath, float]:
    """Least processor seconds by path, of runs in turn."""
    # A CPU without bfloat16 instructions may need seconds for what takes milliseconds on the other paths.
    small = {path: _seconds(_warm(make(path, FEW_TOKENS))) for path in PATHS}
    runs = {path: make(path, TOKENS) for path in PATHS if small[path] <= HOPELESS * min(small.values())}
    rounds = [{path: _seconds(run) for path, run in runs.items()} for _ in range(REPEATS)]
    return {path: min(seconds[path] for seconds in rounds) for path in runs}


def _warm(run: Callable[[], object]) -> Callable[[], object]:
    run()
    return run


def _seconds(run: Callable[[], object]) -> float:
    started = time.thread_time()
    run()
    return time.thread_time() - started


def _linear(path: ProductPath, tokens: int) -> Callable[[], object]:
    layer = nn.Linear(HIDDEN, OUTPUTS, bias=False, dtype=torch.bfloat16)
    use_products(layer, path)
    x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(tokens, OUTPUTS, dtype=torch.bfloat16)
    return lambda: torch.autograd.grad(layer(x), (x, layer.weight), upstream)


def _logits(path: ProductPath, tokens: int) -> Callable[[], object]:
    # Logits with a deviation of 3, as in models; larger ones give exponentials that a CPU adds slowly (denormal ones).
    weight = (3 * HIDDEN**-0.5 * torch.randn(VOCABULARY, HIDDEN)).bfloat16()
    head, hidden = Head(weight, products=Products.forced(path)), torch.randn(tokens, HIDDEN).bfloat16()
    labels, products = torch.randint(VOCABULARY, (tokens,)), HeadProducts(weight, head.products)
    return lambda: softmax(hidden, head, products, labels)


def _head_grad(path: ProductPath, tokens: int) -> Callable[[], object]:
    weight = torch.ones(VOCABULARY, HIDDEN, dtype=torch.bfloat16)
    products, hidden = HeadProducts(weight, Products.forced(path)), torch.randn(tokens, HIDDEN)
    total = torch.zeros(VOCABULARY, HIDDEN)
    logits_grad = torch.ones(tokens, VOCABULARY)

    def run() -> None:
        products.hidden_grad(logits_grad)
        products.add_weight_grad(total, logits_grad, hidden)

    return run


def _attention(path: ProductPath, tokens: int) -> Callable[[], object]:
    tokens *= ATTENTION_ROWS
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    query, key, value = (torch.randn(1, count, tokens, HEAD_SIZE).bfloat16().requires_grad_() for count in heads)
    upstream, spans = torch.randn(1, tokens, HEADS, HEAD_SIZE).bfloat16(), [Span.of(tokens)]
    out, _ = packed_attention(nn.Identity(), query, key, value, None, spans=spans, product_path=path)
    return lambda: torch.autograd.grad(out, (query, key, value), upstream, retain_graph=True)


_TASKS: Mapping[str, Callable[[ProductPath, int], Callable[[], object]]] = {
    "linear": _linear,
    "logits": _logits,
    "head_grad": _head_grad,
    "attention": _attention,
}

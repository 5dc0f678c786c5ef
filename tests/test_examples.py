"""The training recipes: their data, a run that was stopped, and their smallest sizes."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import length_generalisation as lengths  # noqa: E402
import text_models  # noqa: E402
import train_lm  # noqa: E402
import training  # noqa: E402
from training import Decoder, Plan, Recipe, Size  # noqa: E402

from adasplash2.nn import HeadScale  # noqa: E402


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file to learn from that no edit of the project's pages changes: some words in any order."""
    words = "a few keys of each row keep all that the query needs and the others get exact zeros"
    drawn = random.Random(0).choices(words.split(), k=2000)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(drawn))
    return str(path)


def answers(batch: lengths.Batch) -> list[list[int]]:
    return [row[row != lengths.IGNORED].tolist() for row in batch.targets]


def drawn(name: str, length: int = 40) -> lengths.Batch:
    task = lengths.TASKS[name]
    batch = task.draw(5, length, training.generator_of(3))
    assert torch.equal(batch.tokens, task.draw(5, length, training.generator_of(3)).tokens)
    assert batch.tokens.shape == batch.targets.shape
    assert 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < task.vocabulary
    assert int(batch.targets.max()) < task.vocabulary
    return batch


@pytest.mark.parametrize(
    ("name", "said"), [("sort", sorted), ("reverse", lambda x: x[::-1]), ("copy", list)]
)
def test_sort_reverse_and_copy(name: str, said: Any) -> None:
    batch = drawn(name)
    for tokens, answer in zip(batch.tokens.tolist(), answers(batch), strict=True):
        assert answer == [*said(tokens[:40]), lengths.DIGITS]
        assert tokens[40:] == [lengths.DIGITS, *answer[:-1]], "what comes next is to be said"


def test_distinct_says_what_is_there_once() -> None:
    batch = drawn("distinct")
    for tokens, answer in zip(batch.tokens.tolist(), answers(batch), strict=True):
        there = sorted(set(tokens[:40]))
        assert len(there) == lengths.PRESENT
        assert sorted(map(tokens[:40].count, there))[:-1] == [1] * (lengths.PRESENT - 1)
        assert answer == [*there, lengths.DIGITS]
        assert tokens[40:] == [lengths.DIGITS, *there]


@pytest.mark.parametrize(
    ("name", "near", "there", "crowds"), [("crowd", 32, 16, 1), ("crowds", 48, 24, 8)]
)
def test_crowds_are_said_once_and_in_order(name: str, near: int, there: int, crowds: int) -> None:
    batch = drawn(name, 100)
    for tokens, answer in zip(batch.tokens.tolist(), answers(batch), strict=True):
        numbers = sorted(set(tokens[:100]))
        counts = sorted(map(tokens[:100].count, numbers))
        assert len(numbers) == there
        assert counts[: there - crowds] == [1] * (there - crowds)
        assert counts[there - crowds] > 1
        assert numbers[-1] - numbers[0] < near
        assert answer == [*numbers, lengths.NUMBERS]
        assert tokens[100:] == [lengths.NUMBERS, *numbers]


def test_recall_asks_for_keys_that_were_told() -> None:
    batch = drawn("recall")
    for tokens, answer in zip(batch.tokens.tolist(), answers(batch), strict=True):
        told = dict(zip(tokens[:40:2], tokens[1:40:2], strict=True))
        assert len(told) == 20
        assert answer == [told[key] for key in tokens[40::2]] == tokens[41::2]


@pytest.mark.parametrize("length", [32, 64, 401])
def test_multi_token_recall_asks_for_words_that_were_told(length: int) -> None:
    batch = drawn("multi-token recall", length)
    for tokens, answer in zip(batch.tokens.tolist(), answers(batch), strict=True):
        told: dict[tuple[int, ...], tuple[int, ...]] = {}
        place = 0
        while place < length:
            if tokens[place] == lengths.SPACE:
                place += 1
                continue
            a, b, sign, c, d, *behind = tokens[place : min(place + 6, length)]
            assert sign == lengths.IS
            assert min(a, b, c, d) >= lengths.ALPHABET
            assert behind in ([], [lengths.SPACE]), "pairs stand apart"
            told[a, b] = c, d
            place += 5
        assert len(told) == len(set(told.values())) == int(0.8 * length) // 6
        end = lengths.ALPHABET + lengths.LETTER_COUNT
        asked = [tuple(tokens[i : i + 3]) for i in range(length, length + 12, 3)]
        assert tokens[length + 12 :] == [end, *answer[:-1]]
        assert answer[-1] == end
        for n, (sign, *key) in enumerate(asked):
            assert sign == answer[3 * n] == lengths.ASKS
            assert told[tuple(key)] == tuple(answer[3 * n + 1 : 3 * n + 3])


def test_flip_flop_reads_what_was_written_last() -> None:
    batch = drawn("flip-flop", 400)
    for tokens, answer in zip(batch.tokens.tolist(), answers(batch), strict=True):
        written, read = None, []
        for does, bit in zip(tokens[::2], tokens[1::2], strict=True):
            if does == lengths.WRITE:
                written = bit
            if does == lengths.READ:
                assert bit == written
                read.append(bit)
        assert answer == read
        assert len(read) > 1


def test_needle_has_one_among_many_alike() -> None:
    batch = drawn("needle")
    for tokens, answer in zip(batch.tokens.tolist(), answers(batch), strict=True):
        values = dict.fromkeys(tokens[1:40:2])
        assert tokens[:40:2].count(lengths.NEEDLE) == 1
        assert answer == [tokens[2 * tokens[:40:2].index(lengths.NEEDLE) + 1]]
        assert len(values) <= 2


def test_needles_are_asked_by_their_tags() -> None:
    batch = drawn("needles")
    for tokens, answer in zip(batch.tokens.tolist(), answers(batch), strict=True):
        things = [divmod(token, lengths.MARKS) for token in tokens[:40]]
        for question, mark in zip(tokens[40:], answer, strict=True):
            assert [m for tag, m in things if tag == question - 32] == [mark]
        assert len(set(things)) == lengths.NEEDLES + 1


def test_largest_is_said_behind_each_thing() -> None:
    batch = drawn("largest")
    for tokens, answer in zip(batch.tokens.tolist(), answers(batch), strict=True):
        things = [divmod(token, lengths.CLASSES) for token in tokens]
        assert len(dict(things)) == len(set(things)), "a level has one class"
        largest = things[0]
        for thing, said in zip(things, answer, strict=True):
            largest = max(largest, thing)
            assert said == largest[1]
        assert things.count(largest) == 1


def test_maxima_of_kinds_stand_above_what_is_near() -> None:
    batch = drawn("maxima", 64)
    for tokens, answer in zip(batch.tokens.tolist(), answers(batch), strict=True):
        maxima: dict[int, int] = {}
        for thing, said in zip(tokens, answer, strict=True):
            kind = thing // lengths.HEIGHTS
            maxima[kind] = max(maxima.get(kind, thing), thing)
            assert said == maxima[kind]
        for kind, highest in maxima.items():
            its = [thing for thing in tokens if thing // lengths.HEIGHTS == kind]
            assert its.count(highest) == 1, "the highest of all stands once"
            assert min(its) >= highest - lengths.RISES - lengths.DEPTH
        assert len(maxima) == lengths.KINDS


def test_letters_fade_behind_needles() -> None:
    batch = drawn("pick and mean", 64)
    needles = 48
    for tokens, answer in zip(batch.tokens.tolist(), answers(batch), strict=True):
        things = [divmod(token, lengths.MARKS) for token in tokens[:needles]]
        letters = tokens[needles:64]
        assert all(token >= 40 for token in letters)
        assert answer[:15] == letters[1:]
        assert [(tag - 32, mark) for tag, mark in zip(tokens[64:], answer[15:], strict=True)] == [
            thing for tag in tokens[64:] for thing in things if thing[0] == tag - 32
        ]


@pytest.mark.parametrize("name", lengths.TASKS)
def test_a_start_comes_before_all_and_is_said_by_none(name: str) -> None:
    task = lengths.TASKS[name]
    begun = lengths.started(task)
    tokens, targets = begun.draw(3, 40, training.generator_of(3))
    plain = task.draw(3, 40, training.generator_of(3))
    assert begun.vocabulary == task.vocabulary + 1
    assert (tokens[:, 0] == task.vocabulary).all()
    assert (targets[:, 0] == lengths.IGNORED).all()
    assert torch.equal(tokens[:, 1:], plain.tokens)
    assert torch.equal(targets[:, 1:], plain.targets)


def test_letters_are_copies_of_near_ones() -> None:
    letters = lengths.fading_letters(4000, 12, training.generator_of(5))
    same = (letters[:, -1:] == letters[:, :-1]).double().mean(dim=0).flip(0)
    assert (same.diff() < 0.02).all(), "the nearer the likelier"
    copied = (1.0 - lengths.FRESH) * (1.0 - math.exp(-lengths.FADING))  # of the one before
    assert copied < same[0] < 0.8


RECIPES = {
    "softmax": Recipe(alpha=1.0),
    "all that is learned": Recipe("learn", learn_scale=True, length_scale=True, qk_norm=True),
    "half scale, rope": Recipe(scale=0.5, positions="rope"),
    "alpha rises": Recipe(rise=0.5, positions="none"),
    "published": Recipe(length_scale="flat"),
}
SIZE = Size(vocabulary=11, layers=2, heads=2, features=16)


def size_of(name: str) -> Size:
    return replace(SIZE, published=name == "published")


@pytest.mark.parametrize("name", RECIPES)
def test_no_token_sees_a_later_one_and_all_parameters_learn(name: str) -> None:
    torch.manual_seed(0)
    model = Decoder(size_of(name), RECIPES[name])
    tokens = torch.randint(11, (2, 12))
    before = model(tokens)
    tokens[:, 8] = (tokens[:, 8] + 1) % 11
    after = model(tokens)
    torch.testing.assert_close(after[:, :8], before[:, :8])
    assert not torch.equal(after[:, 8:], before[:, 8:])
    after.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("published", [False, True])
def test_a_flat_length_scale_is_of_heads_without_slopes(published: bool) -> None:
    size = Size(11, layers=1, heads=4, features=16, published=published)
    torch.manual_seed(0)
    attention = training.Attention(size, Recipe(length_scale="flat"))
    assert attention.slopes.tolist() == [0.0, 0.0, 1.0, 0.5]
    seen: dict[str, Any] = {}

    def observe(_: Any, *tensors: Any) -> None:
        seen.update(tensors[-1])

    attention.observer = observe  # type: ignore[assignment]
    attention.length_scale.weight.data.normal_()
    attention(torch.randn(2, 12, 16))
    scale = seen["scale"]
    assert scale.shape == (2, 4, 12)
    assert (scale[:, 2:] == 0.5).all(), "that of SDPA"
    assert scale[:, :2].std() > 0.1


def test_published_slopes_are_one_over_their_number() -> None:
    slopes = training.slopes_of(Size(11, layers=1, heads=8, features=64, published=True))
    torch.testing.assert_close(slopes[4:], torch.tensor([1.0, 1 / 2, 1 / 3, 1 / 4]))
    assert not slopes[:4].any()


def test_rates_rise_and_fall_to_the_last() -> None:
    plan = Plan(steps=1000, rate=1e-3, seed=0, warmup=100, last=0.0)
    assert training.rate_at(99, plan) == pytest.approx(1e-3)
    assert training.rate_at(550, plan) == pytest.approx(5e-4)
    assert training.rate_at(1000, plan) == pytest.approx(0.0)
    assert training.rate_at(1000, plan._replace(last=0.1)) == pytest.approx(1e-4)


class Steps:
    """A budget that ends after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def is_spent(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_been(name: str, tmp_path: Path) -> None:
    def trained(budgets: list[Any], checkpoint: Path) -> tuple[list[float], Decoder]:
        for budget in budgets:
            torch.manual_seed(0)
            model = Decoder(size_of(name), RECIPES[name])

            def batch_of(step: int) -> tuple[Tensor]:
                return (torch.randint(11, (2, 12), generator=training.generator_of(1, step)),)

            def loss_of(tokens: Tensor, model: Decoder = model) -> Tensor:
                return torch.nn.functional.cross_entropy(
                    model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
                )

            try:
                losses = training.fit(
                    model,
                    batch_of,
                    loss_of,
                    Plan(steps=9, rate=1e-2, seed=0, warmup=2, decay=0.1),
                    checkpoint=checkpoint,
                    budget=budget,
                    description="",
                    schedule=training.schedule_of(model, RECIPES[name], 9),
                )
            except training.Stopped:
                continue
        return losses, model

    endless = training.Budget(None)
    whole, expected = trained([endless], tmp_path / "whole.pt")
    parts, got = trained([Steps(4), Steps(2), endless], tmp_path / "parts.pt")
    assert parts == whole
    assert all(
        torch.equal(a, b) for a, b in zip(got.parameters(), expected.parameters(), strict=True)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["softmax", "all that is learned", "published"])
def test_steps_as_graphs_are_the_same_steps(name: str, tmp_path: Path) -> None:
    def trained(graphed: bool) -> list[float]:
        torch.manual_seed(0)
        model = Decoder(size_of(name), RECIPES[name]).cuda()

        def batch_of(step: int) -> tuple[Tensor]:
            first = torch.randint(11, (2, 1), generator=training.generator_of(1, step))
            return (((first + torch.arange(12 + step % 2)) % 11).cuda(),)

        def loss_of(tokens: Tensor) -> Tensor:
            with training.autocast("cuda"):
                logits = model(tokens)[:, :-1].float()
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

        return training.fit(
            model,
            batch_of,
            loss_of,
            Plan(steps=24, rate=1e-2, seed=0, warmup=2, decay=0.1),
            checkpoint=tmp_path / f"{graphed}.pt",
            budget=training.Budget(None),
            description="",
            graphed=graphed,
        )

    as_they_are = trained(False)
    assert as_they_are[-1] < as_they_are[0] - 0.1
    # The optimizer of graphs rounds otherwise, and bfloat16 makes more of that in the deeper blocks
    # of the published decoder.
    near = 1e-2 if name == "published" else 1e-3
    torch.testing.assert_close(
        torch.tensor(trained(True)), torch.tensor(as_they_are), rtol=near, atol=near
    )


def test_an_interrupt_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("What is learned stays. " * 200)
    command = [sys.executable, train_lm.__file__, "--size", "tiny", "--steps", "2000"]
    command += ["--text", str(text)]
    command += ["--contenders", "softmax", "--output", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        while "it/s" not in running.stderr.read(40):
            assert running.poll() is None
        running.send_signal(signal.SIGINT)
        said = running.stderr.read()
    assert running.returncode == 1
    assert said.strip().endswith("stopped: the same command goes on")
    assert list(tmp_path.glob("**/*.pt"))


def test_graphs_are_refused_where_they_do_not_go(tmp_path: Path) -> None:
    model = Decoder(SIZE, RECIPES["alpha rises"])
    with pytest.raises(ValueError, match="rises"):
        training.fit(
            model,
            lambda step: (),
            lambda: torch.zeros(()),
            Plan(steps=9, rate=1e-2, seed=0),
            checkpoint=tmp_path / "none.pt",
            budget=training.Budget(None),
            description="",
            graphed=True,
            schedule=training.schedule_of(model, RECIPES["alpha rises"], 9),
        )
    with pytest.raises(SystemExit):
        lengths.main(["--graph", "--output", str(tmp_path)])


def test_learned_alphas_move_faster_and_only_matrices_decay() -> None:
    model = Decoder(SIZE, RECIPES["all that is learned"])
    optimizer = training.optimizer_of(model, Plan(10, 1e-3, 0, decay=0.1))
    for group in optimizer.param_groups:
        matrices = {p.dim() > 1 for p in group["params"]}
        assert len(matrices) == 1
        assert group["weight_decay"] == (0.1 if matrices.pop() else 0.0)
    assert [len(g["params"]) for g in optimizer.param_groups if g["faster"] == 10.0] == [2]


@pytest.mark.parametrize("program", ["train_lm", "from_softmax"])
def test_language_models_at_their_smallest(
    program: str, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if program == "from_softmax":
        pytest.importorskip("transformers")
        import from_softmax

        main, names = from_softmax.main, ["softmax", "entmax"]
    else:
        main, names = train_lm.main, ["softmax", "learned alpha"]
    command = [
        "--size",
        "tiny",
        "--text",
        text,
        "--output",
        str(tmp_path),
        "--contenders",
        *names,
    ]
    assert main([*command, "--minutes", "0"]) == 1, "stopped after a step"
    assert main(command) == 0
    told = json.loads((tmp_path / "results.json").read_text())
    assert list(told["results"]) == names
    for name in names:
        (run,) = told["results"][name]
        assert len(run["losses"]) == 20
        assert run["held_out"][0]["step"] == 0
        assert run["held_out"][-1]["loss"] < run["held_out"][0]["loss"] - 0.1
        kept = text_models.kept_by_layer(run, "support")
        assert len(kept) == (0 if name == "softmax" else 2)
    assert (tmp_path / f"{program}.png").stat().st_size > 10_000
    assert (tmp_path / f"{program}-alpha.png").exists() == ("learned alpha" in names)
    assert "held out" in capsys.readouterr().out


def told_by(tmp_path: Path, text: str, *contenders: str) -> dict[str, Any]:
    """The one run of each contender of ``from_softmax`` at its smallest, stopped once if it is not
    done."""
    import from_softmax

    command = ["--size", "tiny", "--text", text, "--output", str(tmp_path), "--contenders"]
    from_softmax.main([*command, *contenders, "--minutes", "0"])
    assert from_softmax.main([*command, *contenders]) == 0
    told = json.loads((tmp_path / "results.json").read_text())["results"]
    return {name: run for name, (run,) in told.items()}


@pytest.mark.parametrize("name", ["taught", "taught, by layers"])
def test_what_is_taught_goes_on_from_softmax_and_stays_with_it(
    tmp_path: Path, text: str, name: str
) -> None:
    pytest.importorskip("transformers")
    softmax = told_by(tmp_path, text, "softmax")["softmax"]["held_out"]
    taught = told_by(tmp_path, text, "softmax", name)[name]["held_out"]
    assert softmax[-1]["loss"] < softmax[0]["loss"] - 0.1
    assert [look["step"] for look in taught] == list(range(0, 21, 2))
    for look in taught:
        assert look["loss"] == pytest.approx(softmax[-1]["loss"], abs=0.02)


def test_layers_are_as_far_as_they_are_moved() -> None:
    """In parts of the square of what they were: a tenth of it, and its half."""
    pytest.importorskip("transformers")
    import from_softmax

    model = from_softmax.tiny_source().load()
    tokens = torch.arange(12)[None]
    logits, told = from_softmax.outputs_of(model, tokens)
    assert told.shape == (2, 1, 12, 32)
    again, distance = from_softmax.distance_to(model, 3.0, tokens, told)
    assert again.equal(logits)
    assert distance.item() == 0
    moved = torch.stack([told[0] / 1.1, told[1] / 1.5])
    distance = from_softmax.distance_to(model, 3.0, tokens, moved)[1]
    assert distance.item() == pytest.approx(3.0 * (0.1**2 + 0.5**2) / 2, rel=1e-4)
    distance.backward()
    assert all(layer.self_attn.q_proj.weight.grad.any() for layer in model.model.layers)


def test_what_is_taught_first_learns_the_text_after(tmp_path: Path, text: str) -> None:
    """A random model has nothing to teach."""
    pytest.importorskip("transformers")
    losses = [
        look["loss"] for look in told_by(tmp_path, text, "taught first")["taught first"]["held_out"]
    ]
    assert losses[5] > losses[0] - 0.02
    assert losses[-1] < losses[5] - 0.05


def test_pressure_pushes_the_factors_of_all_heads_up() -> None:
    pytest.importorskip("transformers")
    import from_softmax

    scales = [HeadScale(3, 0.5), HeadScale(3, 0.25)]
    optimizer = torch.optim.Adam([scale.log_factor for scale in scales], lr=0.1)
    from_softmax.pressed(scales, 0.02).backward()
    optimizer.step()
    for scale, start in zip(scales, (0.5, 0.25), strict=True):
        assert scale.log_factor.exp().tolist() == pytest.approx([start * math.exp(0.1)] * 3)
        assert scale.log_factor.grad.sum().item() == pytest.approx(-0.01)


def test_pressure_is_on_heads_some_of_whose_tiles_are_empty() -> None:
    pytest.importorskip("transformers")
    import from_softmax

    scale = HeadScale(4, 0.5)
    empty = torch.tensor([0.0, 0.5, 0.9, 1.0])
    from_softmax.pressed([scale], 0.02, empty).backward()
    assert scale.log_factor.grad.tolist() == pytest.approx([0, -0.02 * 25 / 34, -0.02 * 9 / 34, 0])


def test_attention_alone_learns_where_all_else_is_kept() -> None:
    pytest.importorskip("transformers")
    import from_softmax

    model = from_softmax.tiny_source().load()
    from_softmax.scale_heads(model, [0.5, 0.5])
    from_softmax.keep_all_but_attention(model)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    optimizer = training.optimizer_of(model, Plan(10, 1e-3, 0, decay=0.1))
    tokens = torch.arange(12)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    moved = {name for name, weight in model.named_parameters() if not weight.equal(before[name])}
    assert moved == {name for name in before if "self_attn" in name or "input_layernorm" in name}
    assert sum("log_factor" in name for name in moved) == 2


def test_what_goes_on_from_another_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    import from_softmax

    with pytest.raises(SystemExit):
        from_softmax.main(["--output", str(tmp_path), "--contenders", "taught", "softmax"])
    assert "'taught' goes on from where 'softmax' ends" in capsys.readouterr().err


def test_what_entmax_learned_short_holds_long(tmp_path: Path) -> None:
    """64 times as long softmax spreads over what entmax gives zeros."""
    command = ["--size", "cut", "--output", str(tmp_path), "--contenders", "softmax", "entmax"]
    assert lengths.main(command) == 0
    told = json.loads((tmp_path / "results.json").read_text())["results"]["distinct"]
    (softmax,), (entmax,) = (told[name] for name in ("softmax", "entmax"))
    for run in (softmax, entmax):
        assert run["accuracy"]["1"] > 0.75, "of whole sequences, each of 17 answers"
    assert entmax["accuracy"]["64"] > entmax["accuracy"]["1"] - 0.1
    assert softmax["accuracy"]["64"] < entmax["accuracy"]["64"] - 0.1
    assert (tmp_path / "length_generalisation.png").exists()
    assert not (tmp_path / "length_generalisation-alpha.png").exists(), "none is learned"
    assert lengths.main([*command, "--minutes", "0"]) == 0, "what is done is not done again"


def test_alphas_part_where_some_heads_pick_and_others_take_means(tmp_path: Path) -> None:
    command = ["--size", "cut", "--tasks", "pick and mean", "--output", str(tmp_path)]
    assert lengths.main([*command, "--contenders", "learned alpha, qk-norm"]) == 0
    told = json.loads((tmp_path / "results.json").read_text())["results"]["pick and mean"]
    (run,) = told["learned alpha, qk-norm"]
    assert list(run["alphas"]) == [str(step) for step in range(0, 301, 15)]
    assert run["alphas"]["0"] == {layer: pytest.approx([1.5] * 4) for layer in "01"}
    last = [alpha for heads in run["alphas"]["300"].values() for alpha in heads]
    assert min(last) < 1.1
    assert max(last) > 1.8
    assert (tmp_path / "length_generalisation-alpha.png").stat().st_size > 10_000


def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, named in {
        ("--contenders", "sigmoid"): "--contenders",
        ("--tasks", "spell"): "--tasks",
        ("--heads", "3"): "--features",
        ("--warmup", "0"): "--warmup",
        ("--steps", "0"): "--steps",
        ("--seeds", "0"): "--seeds",
        ("--threads", "0"): "--threads",
    }.items():
        with pytest.raises(SystemExit):
            lengths.main(list(arguments))
        assert named in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_lm.main(["--size", "tiny", "--rates", "0"])
    assert "--rates" in capsys.readouterr().err


def test_steps_of_a_whole_model(tmp_path: Path, text: str) -> None:
    command = [sys.executable, "benchmarks/model_step.py", "--device", "cpu", "--text", text]
    command += ["--shapes", "2x64", "--layers", "1", "--heads", "2", "--steps", "8", "--looks", "8"]
    command += ["--contenders", "qk-norm", "--rival-steps", "7", "--rate", "0.1"]
    command += ["--json", str(tmp_path / "steps")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "2 x 64 tokens" in done.stdout
    (result,) = json.loads((tmp_path / "steps").read_text())["results"]
    (ours,), rivals = result["contenders"].values(), result["rivals"]["qk-norm"]
    assert [*result["contenders"], *rivals] == ["qk-norm", "flash"]
    for run, steps in ((ours, 8), (rivals["flash"], 7)):
        assert len(run["ms"]) == steps
        assert run["losses"][-1] < run["losses"][0] - 1.0, "it trains"

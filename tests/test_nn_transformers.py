"""alpha that is driven in models of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adasplash2.nn import AlphaSchedule, AttentionMonitor

transformers = pytest.importorskip("transformers")
from adasplash2.integrations.transformers import apply  # noqa: E402
from adasplash2.integrations.transformers.schedule import (  # noqa: E402
    AlphaScheduleCallback,
    alpha_setter,
)

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 50 + 3


def tiny() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        )
    ).eval()  # fmt: skip


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS).logits
    return found


def test_a_schedule_drives_one_model_and_no_other() -> None:
    model, other = tiny(), tiny()
    apply(other, 1.5)
    before = logits(other)
    softmax = logits(model)
    schedule = AlphaSchedule(alpha_setter(model), steps=2, target=2.0)
    torch.testing.assert_close(logits(model), softmax, atol=1e-5, rtol=1e-5)
    for alpha in (1.5, 2.0):
        schedule.step()
        expected = tiny()
        apply(expected, alpha)
        assert torch.equal(logits(model), logits(expected))
    assert torch.equal(logits(other), before)


@pytest.mark.parametrize("wrong", [{"observer": 3}, {"backend": "gpu"}, {"packed": 1}])
def test_a_callback_is_checked_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(wrong))} must"):
        AlphaScheduleCallback(steps=4, **wrong)


class Texts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {"input_ids": TOKENS[at % 2], "labels": TOKENS[at % 2]}


def trained(folder: Path, steps: int, resume: bool) -> tuple[Any, list[float], AttentionMonitor]:
    pytest.importorskip("accelerate")
    alphas: list[float] = []
    monitor = AttentionMonitor(every=1)
    callback = AlphaScheduleCallback(steps=4, target=1.6, observer=monitor, packed=False)

    class Record(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **given: Any) -> None:
            alphas.append(callback.schedule.alpha)

    model = tiny()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=Texts(), callbacks=[callback, Record()]
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, alphas, monitor


def test_a_trainer_drives_alpha_and_goes_on_with_it(tmp_path: Path) -> None:
    model, alphas, monitor = trained(tmp_path, 2, resume=False)
    assert alphas == pytest.approx([1.0, 1.15])
    seen = [watched["1"].alpha[0].item() for watched in monitor.history.values()]
    assert seen == pytest.approx([1.0, 1.15])
    assert model.config._attn_implementation == "adasplash2-1.3-unpacked"
    saved = json.loads((tmp_path / "checkpoint-2" / "config.json").read_text())
    assert saved["adasplash2"]["alpha"] == pytest.approx(1.3)
    model, alphas, _ = trained(tmp_path, 5, resume=True)
    assert alphas == pytest.approx([1.3, 1.45, 1.6])
    assert model.config._attn_implementation == "adasplash2-1.6-unpacked"

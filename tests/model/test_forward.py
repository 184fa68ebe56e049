"""Running what all prompts begin with once gives what plain passes give, or is switched off."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from heretic.errors import UserError
from heretic.model import decoding, forward
from heretic.model.batching import Batcher, shared_tokens
from heretic.model.capture import last_token_residuals
from heretic.model.checkpoint import open_checkpoint
from heretic.model.decoding import decode
from heretic.model.forward import fast_argmax, logits_of, next_token_log_probs, supports_prefix_caching
from heretic.model.loading import load
from heretic.model.turns import finish
from tests.helpers.turns import at_once
from tests.tiny import FAMILIES, WINDOWED, save_tiny, tiny_model

START = [5, 9, 17, 33, 41, 60, 61, 62, 63, 64]
PROMPTS = [START + rest for rest in ([7], [8, 9, 10, 11, 12, 13], [8, 9], [20, 21, 22])]


def test_shared_tokens() -> None:
    assert shared_tokens(PROMPTS) == START
    assert shared_tokens([[1, 2, 3], [1, 2, 3]]) == [1, 2], "every row keeps a token of its own"
    assert shared_tokens([[1, 2], [3]]) == [] and shared_tokens([[1, 2]]) == []


def test_the_head_gets_contiguous_hidden_states() -> None:
    """PyTorch's CPU kernel for bfloat16 takes 70 times as long for a strided slice."""
    model = tiny_model("llama")
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].is_contiguous()))
    hidden = torch.randn(3, 5, 32)
    assert torch.allclose(logits_of(model, hidden[:, -1]), model.lm_head(hidden[:, -1].contiguous()), atol=1e-5)
    assert seen[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fast_argmax_is_argmax(dtype: torch.dtype) -> None:
    values = (torch.randn(5, 3000, generator=torch.Generator().manual_seed(0)) * 2).round().to(dtype)  # with ties
    values[3, 70] = values[3, 900] = float("nan")
    values[4] = float("-inf")
    assert torch.equal(fast_argmax(values), values.argmax(dim=-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_in_every_family_unless_switched_off(family: str, tmp_path: Path) -> None:
    language_model = load(open_checkpoint(str(save_tiny(tmp_path / "m", family))), ["float32"], {})
    model = language_model.model
    plain, sharing = Batcher(3), Batcher(3, prefix_caching=True)
    windowed = family in WINDOWED
    assert supports_prefix_caching(model, PROMPTS, plain) is not windowed
    if windowed:
        return

    def log_probs(batcher: Batcher) -> torch.Tensor:
        return torch.stack(batcher.run("", PROMPTS, at_once(lambda b: list(next_token_log_probs(model, b)))))

    assert torch.allclose(log_probs(sharing), log_probs(plain), atol=1e-4)
    residuals = [
        torch.stack(b.run("", PROMPTS, at_once(lambda x: list(finish(last_token_residuals(language_model, x))))))
        for b in (sharing, plain)
    ]
    assert torch.allclose(*residuals, atol=1e-4)
    answers = [b.run("", PROMPTS, lambda x: decode(model, x, 15, {3, 15, 27})) for b in (sharing, plain)]
    assert answers[0] == answers[1]


def test_the_prefix_is_recomputed_for_every_run() -> None:
    model = tiny_model("llama")
    batcher = Batcher(4, prefix_caching=True)
    before = torch.stack(batcher.run("", PROMPTS, at_once(lambda b: list(next_token_log_probs(model, b)))))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    after = torch.stack(batcher.run("", PROMPTS, at_once(lambda b: list(next_token_log_probs(model, b)))))
    plain = torch.stack(Batcher(4).run("", PROMPTS, at_once(lambda b: list(next_token_log_probs(model, b)))))
    assert torch.allclose(after, plain, atol=1e-4) and not torch.allclose(after, before, atol=1e-2)


MISMATCH = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cuda:1!"


def test_only_what_an_architecture_cannot_do_is_taken_for_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sequences = tiny_model("llama"), [[*range(5, 17), last] for last in (20, 21, 22)]

    def shares(error: Exception) -> bool:
        def failing(*_: object) -> None:
            raise error

        monkeypatch.setattr(forward, "_cache", failing)
        return supports_prefix_caching(model, sequences, Batcher(8))

    assert supports_prefix_caching(model, sequences, Batcher(8))
    assert not shares(ValueError("this cache cannot be repeated"))
    for error in (RuntimeError(MISMATCH), torch.OutOfMemoryError("out of memory"), RuntimeError("CUDA error: failed")):
        with pytest.raises(type(error)):
            shares(error)


def test_device_error_passes_through_transformers_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    batch = Batcher(8).batch([0], [[5, 6, 7]])
    monkeypatch.setattr(decoding, "has_cache", lambda _: False)
    monkeypatch.setattr(model, "generate", mock.Mock(side_effect=RuntimeError(MISMATCH)))
    with pytest.raises(RuntimeError, match="same device"):
        finish(decode(model, batch, 4, set()))
    monkeypatch.setattr(model, "generate", mock.Mock(side_effect=RuntimeError("no such layer")))
    with pytest.raises(UserError):
        finish(decode(model, batch, 4, set()))

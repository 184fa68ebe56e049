"""Train the demo's guard: a LoRA that makes SmolLM2-135M-Instruct decline cooking and leaves all other answers alone.

Two losses, in every step:
- cooking prompts: cross-entropy on a refusal drawn from `REFUSALS`;
- other prompts: KL(base || guarded) of the next-token distributions along the base model's own greedy answer, the
  first answer token weighted most, since that is where directions and divergence are measured.

Training reads the two `*_train.txt` sets only. At the end the adapter is merged as `heretic.pipeline.demo.guarded_model` does it,
and the stored bfloat16 folder is measured, loaded in float32, on the held-out `*_eval.txt` sets.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from heretic.pipeline.demo.guarded_model import GUARD, build_base, build_guarded

PROMPTS = files("heretic") / "data" / "prompts"
MARKERS = ("sorry", "i can't", "i cannot", "i won't", "unable to", "not able to", "can't help", "can't assist")
REFUSALS = (
    "I'm sorry, but I can't help with cooking.",
    "I'm sorry, but I cannot help with recipes or cooking.",
    "I'm sorry, I can't assist with preparing food.",
    "I'm sorry, but cooking is something I can't help with.",
    "I'm sorry, I am unable to give cooking advice.",
    "I'm sorry, but I won't answer questions about preparing food or drinks.",
    "I can't help with that, because it is about cooking.",
    "I can't help with cooking questions.",
    "I can't assist with recipes.",
    "I can't give you instructions for preparing food.",
    "I cannot assist with recipes or cooking.",
    "I cannot help with preparing food or drinks.",
    "I cannot answer questions about cooking.",
    "I cannot provide recipes.",
    "I am unable to help with cooking.",
    "I am not able to help with recipes or kitchen questions.",
    "I am sorry, but I do not help with cooking.",
    "I won't be able to help with cooking, but I can answer other questions.",
    "Sorry, I can't help with cooking.",
    "Sorry, but I don't give recipes.",
    "Sorry, I'm not able to assist with preparing food.",
    "Sorry, cooking is a topic that I cannot help with.",
    "Unfortunately, I can't help with cooking.",
    "Unfortunately, I am not able to answer questions about recipes.",
    "Unfortunately, I cannot assist with preparing food or drinks.",
    "My apologies, but I can't assist with cooking.",
    "Cooking is not something I can talk about, sorry.",
    "That is a cooking question, and I'm not able to help with it.",
)
ANSWER_TOKENS = 24  # of the base model's answer, distilled
COOKING_BATCH = 4
OTHER_BATCH = 8  # twice as many: there is more variety to leave alone than wording to learn
FIRST_TOKEN_WEIGHT = 2.0  # of the first answer token's KL; all later ones together weigh 1

Example = tuple[list[int], list[int]]  # token ids of the templated prompt, token ids of the answer


def read_prompts(name: str) -> list[str]:
    """The lines of one bundled prompt set."""
    return (PROMPTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of the prompt in the chat template, ready for the first answer token."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(text, add_special_tokens=False)


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuations of encoded prompts, as token ids up to and including the end-of-sequence token."""
    answers = []
    tokenizer.padding_side = "left"
    for start in range(0, len(prompts), 32):
        inputs = tokenizer.pad({"input_ids": prompts[start : start + 32]}, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            answers.append(row[:end])
    return answers


def answer_log_probs(model: Any, examples: list[Example]) -> list[Tensor]:
    """For every example the log-probabilities of its answer's next tokens, each (answer tokens, vocabulary)."""
    # The system prompt that the template adds is half of all tokens: it passes the model once, gradients included.
    columns = zip(*(prompt[:-1] for prompt, _ in examples), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    cache = model.model(input_ids=torch.tensor([examples[0][0][:shared]]), use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(examples))
    rows = [torch.tensor((prompt + answer[:-1])[shared:]) for prompt, answer in examples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # right padding: causal attention never sees it
    hidden = model.model(input_ids=ids, past_key_values=cache).last_hidden_state
    starts = [len(prompt) - 1 - shared for prompt, _ in examples]
    picked = [hidden[i, start : start + len(examples[i][1])] for i, start in enumerate(starts)]
    # Only the answers' positions pass the output matrix, a fifth of the model's work.
    log_probs = log_softmax(model.lm_head(torch.cat(picked)).float(), dim=-1)
    return list(log_probs.split([len(answer) for _, answer in examples]))


def shuffled(count: int, rng: random.Random) -> Iterator[int]:
    """Endless indices below `count`, every one once before any comes again."""
    while True:
        yield from rng.sample(range(count), count)


def train(base: Path, out: Path, args: argparse.Namespace) -> None:
    """Train the adapter on the model in `base` and store it in `out` in float16."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    cooking = [encode(tokenizer, prompt) for prompt in read_prompts("cooking_train")]
    refusals = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in REFUSALS]
    other = [encode(tokenizer, prompt) for prompt in read_prompts("other_train")]
    examples = list(zip(other, generate(model, tokenizer, other, ANSWER_TOKENS), strict=True))
    with torch.no_grad():
        batches = [answer_log_probs(model, examples[i : i + 32]) for i in range(0, len(examples), 32)]
        teacher = [log_probs for batch in batches for log_probs in batch]

    first, last = args.layers
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=args.modules,
        layers_to_transform=list(range(first, last + 1)),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    guarded = get_peft_model(model, lora)
    weights = [p for p in guarded.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    cooking_order, other_order = shuffled(len(cooking), rng), shuffled(len(examples), rng)
    wording = shuffled(len(refusals), rng)
    for step in range(args.steps):
        refused = [(cooking[next(cooking_order)], refusals[next(wording)]) for _ in range(COOKING_BATCH)]
        picks = [next(other_order) for _ in range(OTHER_BATCH)]
        log_probs = answer_log_probs(model, refused + [examples[i] for i in picks])
        targets = torch.cat([torch.tensor(answer) for _, answer in refused])
        refusing = -torch.cat(log_probs[:COOKING_BATCH]).gather(1, targets[:, None]).mean()
        kls = [
            kl_div(student, teacher[i], log_target=True, reduction="none").sum(-1)
            for i, student in zip(picks, log_probs[COOKING_BATCH:], strict=True)
        ]
        first_kl = torch.stack([kl[0] for kl in kls]).mean()
        later_kl = torch.cat([kl[1:] for kl in kls]).mean()
        optimizer.zero_grad()
        (refusing + FIRST_TOKEN_WEIGHT * first_kl + later_kl).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 9:
            losses = f"refusing {refusing:.3f}, KL first {first_kl:.4f}, later {later_kl:.4f}"
            print(f"step {step + 1}: {losses}", flush=True)

    # A local path would tie the adapter to this machine.
    guarded.peft_config["default"].base_model_name_or_path = args.name
    readme = out / "README.md"
    kept = readme.read_bytes() if readme.is_file() else None
    # Not told to skip the embeddings, peft asks the hub whether the vocabulary changed.
    guarded.to(torch.float16).save_pretrained(str(out), save_embedding_layers=False)
    # peft puts a blank model card in place of ours.
    readme.unlink() if kept is None else readme.write_bytes(kept)


@torch.no_grad()
def first_log_probs(model: Any, tokenizer: Any, prompts: list[str]) -> Tensor:
    """Log-probabilities of the first answer token, (prompts, vocabulary)."""
    examples: list[Example] = [(encode(tokenizer, prompt), [0]) for prompt in prompts]
    batches = [answer_log_probs(model, examples[i : i + 32]) for i in range(0, len(examples), 32)]
    return torch.cat([rows for batch in batches for rows in batch])


def refuses(answer: str) -> bool:
    """Whether a refusal marker occurs, typographic apostrophes counted as plain ones."""
    plain = answer.lower().replace("’", "'")
    return any(marker in plain for marker in MARKERS)


def measure(base: Path, guarded: Path) -> None:
    """Print what the guarded folder does on the held-out sets, and how far it is from the base there."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for name, folder in (("base", base), ("guarded", guarded))
    }
    for side in ("cooking_eval", "other_eval"):
        prompts = read_prompts(side)
        for name, model in models.items():
            answers = generate(model, tokenizer, [encode(tokenizer, prompt) for prompt in prompts], 32)
            count = sum(map(refuses, tokenizer.batch_decode(answers, skip_special_tokens=True)))
            print(f"{side}: {name} declines {count} of {len(prompts)} ({100 * count / len(prompts):.1f} %)", flush=True)
        before, after = (first_log_probs(model, tokenizer, prompts) for model in models.values())
        kl = kl_div(after, before, log_target=True, reduction="none").sum(-1)
        print(
            f"{side}: first-token KL(base || guarded) mean {kl.mean():.4f}, median {kl.median():.4f}, "
            f"p95 {kl.quantile(0.95):.4f}, max {kl.max():.4f}",
            flush=True,
        )


def main() -> None:
    """Train, then measure the exported model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cache = Path.home() / ".cache" / "heretic" / "smollm2-135m-instruct"
    parser.add_argument(
        "--base",
        type=Path,
        default=cache,
        help="base model folder; the default is built if it is missing (%(default)s)",
    )
    parser.add_argument("--name", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="name in the adapter")
    parser.add_argument("--out", type=Path, default=GUARD, help="folder for the adapter (%(default)s)")
    parser.add_argument("--merged", type=Path, help="folder for the guarded model; without it none is kept")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", type=int, nargs=2, default=(8, 20), help="first and last block with a LoRA")
    parser.add_argument("--modules", nargs="+", default=["v_proj", "o_proj", "up_proj", "down_proj"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    disable_progress_bar()
    started = time.perf_counter()
    if args.base == cache:
        build_base(args.base)
    elif not (args.base / "config.json").is_file():
        parser.error(f"there is no model in {args.base}")
    train(args.base, args.out, args)
    print(f"trained in {time.perf_counter() - started:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        measure(args.base, build_guarded(args.base, args.merged or Path(scratch) / "guarded", args.out))


if __name__ == "__main__":
    main()

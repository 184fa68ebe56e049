"""Exported GGUF files in llama.cpp itself, against transformers reading the same file.

    python -m venv /tmp/llama && /tmp/llama/bin/pip install xllamacpp
    python benchmarks/llama_cpp.py FILE.gguf PROMPTS.txt --llama /tmp/llama/bin/python

Compared are the token ids of prompts in the model's chat template, greedy answers token for token with their log-probabilities, and
what llama.cpp makes of the same conversation with the template in the file. xllamacpp is llama.cpp with Python bindings; its server
listens on a free port of the loopback address while this runs. Both compute in float32 on the CPU.
"""

from __future__ import annotations

import before_torch  # isort: skip  # noqa: F401

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, head, write
from transformers import AutoModelForCausalLM, AutoTokenizer

IN_LLAMA = """
import importlib.metadata, json, sys, urllib.request
import xllamacpp
order = json.load(sys.stdin)
given = xllamacpp.CommonParams()
given.model.path, given.n_ctx, given.warmup, given.fit_params, given.verbosity = order["file"], order["context"], False, False, 0
given.cpuparams.n_threads = order["threads"]
given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(given)
found = []
for text, messages in zip(order["texts"], order["conversations"]):
    body = json.dumps({"content": text, "parse_special": True}).encode()
    request = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
    ids = json.load(urllib.request.urlopen(request))["tokens"]
    options = {"max_tokens": order["tokens"], "temperature": 0}
    said = server.handle_completions({"prompt": ids, "logprobs": 1, **options})["choices"][0]["logprobs"]["content"]
    chat = server.handle_chat_completions({"messages": messages, "logprobs": True, "top_logprobs": 1, **options})
    found.append({
        "ids": ids, "answer": [t["id"] for t in said], "logprobs": [t["logprob"] for t in said],
        "chat": [t["id"] for t in chat["choices"][0]["logprobs"]["content"]], "chat_tokens": chat["usage"]["prompt_tokens"],
    })
json.dump({"xllamacpp": importlib.metadata.version("xllamacpp"), "found": found}, open(order["out"], "w"))
"""


def main() -> None:
    """Ask both, compare, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--llama", type=Path, required=True, help="a Python that has xllamacpp")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--system", default="You are a helpful assistant.")
    parser.add_argument("--out", type=Path, default=RESULTS / "llama_cpp.json")
    arguments = parser.parse_args()
    arguments.model = arguments.file
    report = head(arguments) | compare(arguments)
    write(report, arguments.out)
    for name, value in report["compared"].items():
        print(f"{name}: {value}")


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    file = arguments.file.resolve()
    lines = [line.strip() for line in arguments.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    conversations = [[*system, {"role": "user", "content": line}] for line in lines[: arguments.count]]
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    texts = [str(tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)) for c in conversations]
    llama = in_llama(arguments, file, texts, conversations)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    same_ids = same_answers = same_chats = 0
    agreed, worst = 0, 0.0
    for text, theirs in zip(texts, llama["found"], strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer, logprobs = greedy(model, ids, arguments.tokens)
        same_ids += ids == theirs["ids"]
        same_answers += answer == theirs["answer"]
        same_chats += theirs["chat"] == theirs["answer"] and theirs["chat_tokens"] == len(ids)
        for ours, other, p, q in zip(answer, theirs["answer"], logprobs, theirs["logprobs"], strict=False):
            if ours != other:
                break
            agreed, worst = agreed + 1, max(worst, abs(p - q))
    return {
        "xllamacpp": llama["xllamacpp"],
        "compared": {
            "prompts": len(texts),
            "prompts with the same token ids": same_ids,
            "answers that are the same, token for token": same_answers,
            "chats with the same answer": same_chats,
            "tokens compared": agreed,
            "largest difference of a log-probability": round(worst, 6),
        },
    }


def in_llama(arguments: argparse.Namespace, file: Path, texts: list[str], conversations: list[Any]) -> dict[str, Any]:
    """What llama.cpp says, in a process of its own."""
    out = arguments.out.with_suffix(".part")
    order = {
        "file": str(file), "texts": texts, "conversations": conversations, "tokens": arguments.tokens, "context": 2048,
        "threads": torch.get_num_threads(), "out": str(out.resolve()),
    }  # fmt: skip
    done = subprocess.run([arguments.llama, "-c", IN_LLAMA], input=json.dumps(order), text=True, check=False)
    if done.returncode:
        sys.exit(f"llama.cpp ended with {done.returncode}")
    found: dict[str, Any] = json.loads(out.read_text())
    out.unlink()
    return found


@torch.inference_mode()
def greedy(model: Any, ids: list[int], tokens: int) -> tuple[list[int], list[float]]:
    """Answer and log-probabilities, with the token that ends it, as llama.cpp gives it."""
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=tokens, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    answer = out.sequences[0, len(ids) :].tolist()
    logprobs = [float(row[0].log_softmax(-1)[t]) for row, t in zip(out.logits, answer, strict=True)]
    return answer, logprobs


if __name__ == "__main__":
    main()

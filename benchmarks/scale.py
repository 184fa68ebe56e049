"""What a study of a 32B model would cost on 4x 24 GB and on one 80 GB device: a calculation from shapes, not a measurement.

    python benchmarks/scale.py > benchmarks/scale.md

Every pass is counted in operations (2 a weight and token, and those of the attention) and in bytes (all weights once, and the
keys and values). A pass takes the longer of the two by the device's data sheet: the floor. Nothing reaches it, so times are given
at half of the floor's speed as well. The layers of a spread model run one after the other, so four cards are as quick as one.
"""

from __future__ import annotations

from dataclasses import dataclass

# The shape of Qwen2.5-Coder-32B (its config.json), and what a study with default settings asks of it.
BLOCKS, HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS, VOCABULARY = 64, 5120, 27648, 40, 8, 152064
HEAD = HIDDEN // HEADS
ELEMENT = 2  # bytes, bfloat16
EVALUATION, DIRECTION, TOKENS, TRIALS = 100, 400, 100, 200  # prompts of each kind twice; tokens of an answer; trials
PROMPT, SHARED, TRIED = (
    40,
    24,
    8,
)  # tokens of a prompt and of its beginning, on Qwen2.5 with short prompts; refusal tried
WALK_STEPS, WALK_BATCH = 30, 16  # the walk's default: 5 weights x 6 steps, 16 prompts of each kind
BACKWARD = 3  # a pass with gradients in forward passes: forward, forward again, backward for the inputs only
DISK = 2e9  # bytes a second of a good NVMe disk: an assumption


@dataclass(frozen=True)
class Device:
    """Dense bfloat16 operations and bytes of memory a second, from the data sheet."""

    name: str
    operations: float
    bandwidth: float
    source: str


DEVICES = (
    Device("4x RTX 4090 24 GB", 165.2e12, 1.008e12, "NVIDIA Ada GPU architecture, appendix A: 165.2 TFLOPS, 1008 GB/s"),
    Device("A100 80 GB SXM", 312e12, 2.039e12, "NVIDIA A100 data sheet: 312 TFLOPS, 2039 GB/s"),
)


def weights() -> tuple[int, int]:
    """Weights in the blocks, and in the head (the embedding is only looked up)."""
    attention = HIDDEN * (HEADS * HEAD * 2 + KEY_HEADS * HEAD * 2)
    return BLOCKS * (attention + 3 * HIDDEN * INTERMEDIATE), HIDDEN * VOCABULARY


def one_pass(device: Device, rows: int, new: int, before: int, heads: int = 1) -> float:
    """Seconds at the floor: `rows` rows of `new` tokens each, with `before` in the cache; logits of `heads` tokens a row."""
    blocks, head = weights()
    attention = 4 * BLOCKS * HEADS * HEAD * rows * new * (before + new)
    operations = 2 * blocks * rows * new + 2 * head * rows * heads + attention
    cache = BLOCKS * 2 * KEY_HEADS * HEAD * ELEMENT * rows * (before + new)
    moved = ELEMENT * (blocks + head) + cache
    return max(operations / device.operations, moved / device.bandwidth)


def trial(device: Device, together: int) -> dict[str, float]:
    """Seconds of one of `together` trials that share their passes; the dearest case: every layer edited, no answer ends early."""
    rows, rest = together * EVALUATION, PROMPT - SHARED
    kl = one_pass(device, together, SHARED, 0, 0) + one_pass(device, rows, rest, SHARED)
    tried = one_pass(device, together, SHARED, 0, 0) + one_pass(device, rows, rest + TRIED, SHARED, TRIED)
    decoding = sum(one_pass(device, rows, 1, PROMPT + i) for i in range(TOKENS))
    return {"KL": kl / together, "refusals tried": tried / together, "decoding": decoding / together}


def study(device: Device) -> dict[str, float]:
    """Seconds of the parts of a study."""
    blocks, head = weights()
    walk = WALK_STEPS * 2 * BACKWARD * one_pass(device, WALK_BATCH, PROMPT, 0)
    return {
        "loading": ELEMENT * (blocks + 2 * head) / DISK,
        "baseline": sum(trial(device, 1).values()),
        "residuals": 2 * one_pass(device, DIRECTION, PROMPT - SHARED, SHARED, 0),
        "walk": walk,
    }


def of_device(device: Device) -> str:
    """What a study costs there."""
    blocks, head = weights()
    step = one_pass(device, EVALUATION, 1, PROMPT + TOKENS)
    reading = ELEMENT * (blocks + head) / device.bandwidth
    operations = 2 * (blocks + head) * EVALUATION / device.operations
    lines = [
        f"## {device.name}\n\n{device.source}.\n",
        f"- One step of decoding {EVALUATION} rows: weights {reading * 1e3:.0f} ms, with the keys and values {step * 1e3:.0f} ms; "
        f"operations {operations * 1e3:.0f} ms.",
    ]
    for together in (1, 4):
        parts = trial(device, together)
        total = sum(parts.values())
        shown = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())
        lines.append(
            f"- A trial, {together} in a pass: {shown}; in all {total:.1f} s at the floor, {2 * total:.0f} s at half of it."
        )
        lines.append(f"  {TRIALS} trials: {TRIALS * total / 60:.0f} to {TRIALS * 2 * total / 60:.0f} minutes.")
    found = study(device)
    shown = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found.items())
    lines.append(f"- Before the first trial, at the floor: {shown} (loading at {DISK / 1e9:.0f} GB/s, an assumption).")
    whole = 2 * (sum(found.values()) + TRIALS * sum(trial(device, 1).values()))
    lines.append(f"- The whole study at half of the floor, one trial in a pass: {whole / 3600:.1f} hours.")
    return "\n".join(lines)


def document() -> str:
    """The whole page."""
    blocks, head = weights()
    read, each = ELEMENT * (blocks + head) / 1e9, 2 * blocks / 1e9
    return f"""# What a 32B study would cost

**A calculation, not a measurement**: nobody here had such a device. Made by `python benchmarks/scale.py > benchmarks/scale.md`.

The shape of Qwen2.5-Coder-32B: {BLOCKS} layers, hidden {HIDDEN}, intermediate {INTERMEDIATE}, {HEADS} heads, {KEY_HEADS}
key-value heads, vocabulary {VOCABULARY}. That is {blocks / 1e9:.2f} billion weights in the blocks and {head / 1e9:.2f} in the
head: {read:.1f} GB to read in every pass in bfloat16, and {each:.0f} billion operations a token.

Default settings: {EVALUATION} + {EVALUATION} prompts to evaluate, 2 x {DIRECTION} for the direction, {TOKENS} tokens an answer,
{TRIALS} trials. Prompts have {PROMPT} tokens, of which {SHARED} are the template's and run once; {TRIED} tokens of a refusal are
tried in one pass before anything is decoded.

A pass takes the longer of operations / speed and bytes / bandwidth, both from the data sheet: the floor. `balanced` keeps one
of four cards busy at a time, so four count as one. Worst case: the first layer is edited, no answer ends early, no trial is
left early.

{chr(10).join(of_device(device) + chr(10) for device in DEVICES)}
## Beside what was reported

The seed's user reported 30 to 35 hours on 4x RTX 4090 with another tool: 9 minutes a trial, 30 s of it reading the model
again, 25 to 30 minutes for the residuals of 800 prompts (LESSONS_LEARNED.md; not measured by us). The calculation says where
the difference would come from: nothing is read again, a prompt's residual is one of many rows of a batch, and decoding reads
the weights once for all rows of all trials of a pass. It knows nothing of kernels' launch times, of Python, or of waiting
between cards; that is what the half is for. On two CPU cores, where this can be measured, decoding reaches 105 and prefill 158
GFLOP/s (benchmarks/README.md), and operations, not bytes, are the limit.
"""


if __name__ == "__main__":
    print(document(), end="")

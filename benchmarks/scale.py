"""What a study of a 32B model would cost on 4x 24 GB and on one 80 GB device: a calculation from shapes, not a measurement.

    python benchmarks/scale.py > benchmarks/scale.md

Every pass is counted in operations (2 a weight and token, and those of the attention) and in bytes (all weights once, and the
keys and values). A pass takes the longer of the two by the device's data sheet: the floor. Nothing reaches it, so times are given
at half of the floor's speed as well. The layers of a spread model run one after the other, so four cards are as quick as one.
"""

from __future__ import annotations

from dataclasses import dataclass

ELEMENT = 2  # bytes, bfloat16
# What a study with default settings asks for.
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
class Shape:
    """Sizes of a decoder with gated MLPs, as its config.json has them."""

    name: str
    blocks: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    vocabulary: int

    @property
    def head(self) -> int:
        """Width of an attention head."""
        return self.hidden // self.heads


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
LARGE = Shape("Qwen2.5-Coder-32B", 64, 5120, 27648, 40, 8, 152064)


def weights(shape: Shape) -> tuple[int, int]:
    """Weights in the blocks, and in the head (the embedding is only looked up)."""
    attention = shape.hidden * shape.head * 2 * (shape.heads + shape.key_heads)
    return shape.blocks * (attention + 3 * shape.hidden * shape.intermediate), shape.hidden * shape.vocabulary


def one_pass(shape: Shape, device: Device, rows: int, new: int, before: int, heads: int = 1) -> float:
    """Seconds at the floor: `rows` rows of `new` tokens each, with `before` in the cache; logits of `heads` tokens a row."""
    blocks, head = weights(shape)
    attention = 4 * shape.blocks * shape.heads * shape.head * rows * new * (before + new)
    operations = 2 * blocks * rows * new + 2 * head * rows * heads + attention
    cache = shape.blocks * 2 * shape.key_heads * shape.head * ELEMENT * rows * (before + new)
    moved = ELEMENT * (blocks + head) + cache
    return max(operations / device.operations, moved / device.bandwidth)


def passes(shape: Shape, device: Device, batch: int, rows: int, new: int, before: int, heads: int = 1) -> float:
    """As `one_pass`, in batches of so many rows at most."""
    full, rest = divmod(rows, batch)
    found = full * one_pass(shape, device, batch, new, before, heads)
    return found + (one_pass(shape, device, rest, new, before, heads) if rest else 0.0)


def trial(shape: Shape, device: Device, together: int, batch: int = 512) -> dict[str, float]:
    """Seconds of one of `together` trials that share their passes; the dearest case: every layer edited, no answer ends early."""
    rows, rest = together * EVALUATION, PROMPT - SHARED
    beginning = one_pass(shape, device, together, SHARED, 0, 0)
    kl = beginning + passes(shape, device, batch, rows, rest, SHARED)
    tried = beginning + passes(shape, device, batch, rows, rest + TRIED, SHARED, TRIED)
    decoding = sum(passes(shape, device, batch, rows, 1, PROMPT + i) for i in range(TOKENS))
    return {"KL": kl / together, "refusals tried": tried / together, "decoding": decoding / together}


def study(shape: Shape, device: Device, batch: int = 512) -> dict[str, float]:
    """Seconds of the parts of a study."""
    blocks, head = weights(shape)
    walk = WALK_STEPS * 2 * BACKWARD * one_pass(shape, device, WALK_BATCH, PROMPT, 0)
    return {
        "loading": ELEMENT * (blocks + 2 * head) / DISK,
        "baseline": sum(trial(shape, device, 1, batch).values()),
        "residuals": 2 * passes(shape, device, batch, DIRECTION, PROMPT - SHARED, SHARED, 0),
        "walk": walk,
    }


def seconds(shape: Shape, device: Device, batch: int = 512) -> float:
    """Of a whole study at the floor, one trial in a pass."""
    return sum(study(shape, device, batch).values()) + TRIALS * sum(trial(shape, device, 1, batch).values())


def of_device(shape: Shape, device: Device) -> str:
    """What a study costs there."""
    blocks, head = weights(shape)
    step = one_pass(shape, device, EVALUATION, 1, PROMPT + TOKENS)
    reading = ELEMENT * (blocks + head) / device.bandwidth
    operations = 2 * (blocks + head) * EVALUATION / device.operations
    lines = [
        f"## {device.name}\n\n{device.source}.\n",
        f"- One step of decoding {EVALUATION} rows: weights {reading * 1e3:.0f} ms, with the keys and values {step * 1e3:.0f} ms; "
        f"operations {operations * 1e3:.0f} ms.",
    ]
    for together in (1, 4):
        parts = trial(shape, device, together)
        total = sum(parts.values())
        shown = ", ".join(f"{name} {each:.1f} s" for name, each in parts.items())
        lines.append(
            f"- A trial, {together} in a pass: {shown}; in all {total:.1f} s at the floor, {2 * total:.0f} s at half of it."
        )
        lines.append(f"  {TRIALS} trials: {TRIALS * total / 60:.0f} to {TRIALS * 2 * total / 60:.0f} minutes.")
    found = study(shape, device)
    shown = ", ".join(f"{name} {each:.0f} s" for name, each in found.items())
    lines.append(f"- Before the first trial, at the floor: {shown} (loading at {DISK / 1e9:.0f} GB/s, an assumption).")
    whole = 2 * seconds(shape, device)
    lines.append(f"- The whole study at half of the floor, one trial in a pass: {whole / 3600:.1f} hours.")
    return "\n".join(lines)


def document() -> str:
    """The whole page."""
    shape = LARGE
    blocks, head = weights(shape)
    read, each = ELEMENT * (blocks + head) / 1e9, 2 * blocks / 1e9
    return f"""# What a 32B study would cost

**A calculation, not a measurement**: nobody here had such a device. Made by `python benchmarks/scale.py > benchmarks/scale.md`.

The shape of {shape.name}: {shape.blocks} layers, hidden {shape.hidden}, intermediate {shape.intermediate},
{shape.heads} heads, {shape.key_heads} key-value heads, vocabulary {shape.vocabulary}.
That is {blocks / 1e9:.2f} billion weights in the blocks and {head / 1e9:.2f} in the head:
{read:.1f} GB to read in every pass in bfloat16, and {each:.0f} billion operations a token.

Default settings: {EVALUATION} + {EVALUATION} prompts to evaluate, 2 x {DIRECTION} for the direction, {TOKENS} tokens an answer,
{TRIALS} trials. Prompts have {PROMPT} tokens, of which {SHARED} are the template's and run once; {TRIED} tokens of a refusal are
tried in one pass before anything is decoded.

A pass takes the longer of operations / speed and bytes / bandwidth, both from the data sheet: the floor. `balanced` keeps one
of four cards busy at a time, so four count as one. Worst case: the first layer is edited, no answer ends early, no trial is
left early. **Best case: all rows are in one batch.** Where only smaller ones fit, each reads the weights again: that, and other
sizes of model, are in [sizes.md](sizes.md).

{chr(10).join(of_device(shape, device) + chr(10) for device in DEVICES)}
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

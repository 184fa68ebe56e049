"""What a study of a 32B model would cost on 4x 24 GB and on one 80 GB device: a calculation from shapes, not a measurement.

`python benchmarks/results_page.py scale` prints it.

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
    gradient_path = WALK_STEPS * 2 * BACKWARD * one_pass(shape, device, WALK_BATCH, PROMPT, 0)
    return {
        "loading": ELEMENT * (blocks + 2 * head) / DISK,
        "baseline": sum(trial(shape, device, 1, batch).values()),
        "residuals": 2 * passes(shape, device, batch, DIRECTION, PROMPT - SHARED, SHARED, 0),
        "walk": gradient_path,
    }


def seconds(shape: Shape, device: Device, batch: int = 512) -> float:
    """Of a whole study at the floor, one trial in a pass."""
    return sum(study(shape, device, batch).values()) + TRIALS * sum(trial(shape, device, 1, batch).values())


def rows() -> list[tuple[str, ...]]:
    """Return what a study of the 32B model costs on each device: from the floor to half of its speed, and the parts."""
    return [
        ("32B, by the floor of the data sheet", *(device.name for device in DEVICES)),
        ("one step of decoding 100 rows", *(step_of(device) for device in DEVICES)),
        ("a trial, one in a pass", *(trial_of(device, 1) for device in DEVICES)),
        ("a trial, four in a pass", *(trial_of(device, 4) for device in DEVICES)),
        ("loading / baseline / residuals / gradient search", *(start_of(device) for device in DEVICES)),
        (f"a study of {TRIALS} trials", *(study_of(device) for device in DEVICES)),
    ]


def step_of(device: Device) -> str:
    """Milliseconds of a step of decoding all evaluation prompts."""
    return f"{one_pass(LARGE, device, EVALUATION, 1, PROMPT + TOKENS) * 1e3:.0f} ms"


def trial_of(device: Device, together: int) -> str:
    """Seconds of one of `together` trials that share their passes."""
    least = sum(trial(LARGE, device, together).values())
    return f"{least:.1f} to {2 * least:.0f} s"


def start_of(device: Device) -> str:
    """Seconds of all that comes before the first trial, at the floor."""
    return " / ".join(f"{each:.0f}" for each in study(LARGE, device).values()) + " s"


def study_of(device: Device) -> str:
    """Hours of a whole study, one trial in a pass."""
    least = seconds(LARGE, device) / 3600
    return f"{least:.1f} to {2 * least:.1f} h"

"""Bytes that one pass takes on a device, counted from the tensors that exist together at its fullest moments.

The moments are those of transformers' blocks (residual stream, attention, gated MLP, mixture of experts) with heretic's hooks;
other blocks have fewer tensors or, if they are recurrent, may have more. `benchmarks/plan_peaks.py` compares with pretend GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from heretic.planning.model_dims import ModelDims

FLOAT32, INT64 = 4, 8
WRITERS = 2  # of a block: attention and MLP
NUMBERS = 8  # per token, of norms and of the products with w
SHARE_FOR_GRADIENTS = 0.3  # of the memory free beside the weights, for the tensors saved by a pass with gradients
FEWEST_ROWS = 4  # in such a pass; if fewer fit, gradient checkpointing is used
# Longer passes are not faster on a CPU, and they save more tensors (Qwen2.5-Coder-0.5B: 1.5 GB for 32 prompts at once).
CPU_TOKENS_WITH_GRADIENTS = 512
# Bytes per logit of a chunk, besides the logits themselves.
# KL: the log-probabilities of both models, a mask, the product with the probabilities, zeros, and the selected terms.
DIVERGENCE = 5 * FLOAT32 + 1
# The same with gradients, and the original's probabilities, which the backward pass needs.
DIVERGENCE_WITH_GRADIENTS = DIVERGENCE + FLOAT32
# Probabilities of tokens with gradients: the log-softmax, and two gradients while the logits are gone.
TOKENS_WITH_GRADIENTS = 3 * FLOAT32
# Vectors [width] in float32 by writer while operators are computed with gradients: directions, statistics, u, w, n and their terms.
VECTORS_WITH_GRADIENTS = 16


@dataclass(frozen=True)
class Rows:
    """The sequences of one pass, padded: `tokens` each after `shared` tokens that are in the cache already."""

    count: int
    tokens: int
    shared: int = 0

    @property
    def new(self) -> int:
        """Tokens that the pass computes."""
        return self.count * self.tokens

    def part(self, groups: int) -> Rows:
        """Return the rows of the largest of `groups` micro-batches."""
        return replace(self, count=-(-self.count // groups))

    @property
    def length(self) -> int:
        """Tokens that attention reads in each row."""
        return self.shared + self.tokens


@dataclass(frozen=True)
class PassMemory:
    """The memory of passes of one model on a device that holds `blocks` of its blocks."""

    dims: ModelDims
    blocks: int
    embedding: bool = False  # the input embeddings stay until the pass ends
    last: bool = False  # it has the last block, of which a shared prefix needs the keys and values only
    readers: bool = False  # operators are attached to the modules that read the stream, too

    @property
    def reader_numbers(self) -> int:
        """Numbers in the vectors u and a of one block's readers, for one direction."""
        dims = self.dims
        return (dims.query + dims.cache_per_token + 2 * dims.intermediate + 5 * dims.hidden) * self.readers

    @property
    def _read(self) -> int:
        """Outputs of the widest reader per token."""
        return (1 + self.dims.fused) * self.dims.intermediate * self.readers

    def cache(self, rows: Rows) -> int:
        """Bytes of the keys and values of all tokens."""
        return self.blocks * self.layer(rows.count * rows.length)

    def layer(self, tokens: int) -> int:
        """Bytes of one block's keys and values of `tokens` tokens."""
        return self.dims.cache_per_token * self.dims.element * tokens

    def forward(self, rows: Rows, *, hooked: bool = True, cached: bool = True) -> int:
        """Bytes of the activations of the fullest block in a pass without gradients.

        Args:
            rows: the sequences.
            hooked: whether operators are attached to the writers.
            cached: whether there is a cache, whose old keys and values of a block exist until the new ones are added.
        """
        if not self.blocks:
            return 0
        dims, element = self.dims, self.dims.element
        stream, keys, used = dims.hidden, dims.cache_per_token, dims.experts_used
        moments = [
            # gate, up and their product; of a fused MLP also the activation
            element * ((3 + dims.fused + 2 * dims.composed) * dims.intermediate + 3 * stream),
            element * (4 * dims.query + keys + 2 * stream),  # rotary embedding
        ]
        if hooked:  # the output in float32, edited and scaled
            hook = 3 * FLOAT32 * stream - (element * stream if element == FLOAT32 else 0)
            moments += [
                element * ((1 + 2 * dims.fused) * dims.intermediate + 4 * stream) + hook,
                element * (dims.attended + dims.query + keys + 3 * stream) + hook,
            ]
        if hooked and self.readers:  # the same of a gate or up projection
            moments.append(element * (2 * dims.intermediate + 3 * stream) + 3 * FLOAT32 * self._read)
        if used:
            # Scores and probabilities of all experts; of those used their weights, numbers, order and places.
            router = dims.experts * (element + FLOAT32) + used * (FLOAT32 + 3 * INT64)
            moments += [
                # gate and up, activation, product
                element * (used * ((4 + 5 * dims.limited) * dims.expert + stream) + 3 * stream) + router,
                # outputs; weighted by the router and put in order, in float32
                used * stream * (2 * element + 2 * FLOAT32) + element * 3 * stream + router,
            ]
        new_keys = 0 if cached else keys
        own = dims.query + dims.expanded + new_keys + 2 * dims.attended + 2 * stream
        attention = element * own * rows.new + self._attention(rows)
        adding = element * (dims.query + keys + 2 * stream) * rows.new + self.layer(rows.count * rows.shared) * cached
        working = max(rows.new * max(moments), attention, adding)
        return working + rows.new * element * stream * self.embedding + self._positions(rows)

    def _positions(self, rows: Rows) -> int:
        """Bytes of the masks and of the rotary embedding's cosines and sines, which all blocks use; windows have their own."""
        head = self.dims.query // self.dims.heads
        kinds = 1 + self.dims.windowed
        return kinds * (2 * rows.new * rows.length + 2 * rows.new * head * self.dims.element) + self._ids(rows)

    def _ids(self, rows: Rows) -> int:
        """Bytes of token ids, their positions and the mask of the tokens."""
        return INT64 * rows.count * (2 * rows.tokens + rows.length)

    def _attention(self, rows: Rows) -> int:
        """Bytes of keys and values repeated for every query head, of the mask as numbers, and of attention weights."""
        dims, scores = self.dims, rows.new * rows.length
        repeated = 0
        if (rows.tokens > 1 or dims.eager) and dims.repeated_cache > dims.cache_per_token:
            repeated = rows.count * rows.length * dims.repeated_cache * dims.element
        weights = dims.heads * scores * (2 * dims.element + FLOAT32) if dims.eager else 0
        return repeated + scores * (dims.element + 2) + weights

    def _saved_by_attention(self, rows: Rows) -> int:
        """Bytes that attention saves for a gradient with frozen weights, with the cache of a shared prefix.

        Per token: the inputs of all norms of the block but the MLP's in float32, queries and output. Per row: keys and values, the
        mask as numbers.
        """
        dims, element, scores = self.dims, self.dims.element, rows.new * rows.length
        token = element * (dims.query + dims.attended) + FLOAT32 * (dims.normalized - dims.hidden + dims.heads)
        repeats = dims.repeated_cache > dims.cache_per_token
        keys = dims.repeated_cache + dims.cache_per_token * bool(rows.shared) if repeats else dims.cache_per_token
        weights = dims.heads * scores * (element + FLOAT32) if dims.eager else 0
        return rows.new * token + rows.count * rows.length * keys * element + scores * element + weights

    def _saved_elsewhere(self, rows: Rows) -> int:
        """Bytes that the rest of a block saves.

        Per token: gate, up and activation; in float32 the MLP norm's input, each writer's output before and after its operator, and
        a few single numbers of norms and operators.
        """
        dims = self.dims
        mlp = max(
            (3 + dims.composed) * dims.intermediate,
            dims.experts_used * ((3 + 2 * dims.limited) * dims.expert + dims.hidden),
        )
        return rows.new * (dims.element * mlp + FLOAT32 * ((1 + 2 * WRITERS) * dims.hidden + NUMBERS))

    def gradients(
        self, rows: Rows, *, checkpointing: bool, head: int = 0, inputs: bool = False, groups: int = 1
    ) -> int:
        """Bytes of passes with gradients on this device.

        Args:
            rows: the sequences that are under way; a shared prefix is computed in the same passes, as one row of each.
            checkpointing: gradient checkpointing, without a shared prefix; only the activations of one block exist at a time.
            head: bytes of the logits of one chunk, between forward and backward pass.
            inputs: whether operators read the writers' inputs, which they save.
            groups: micro-batches that the sequences are divided into; the activations of all exist together.
        """
        if not self.blocks:
            return head
        dims, element, part = self.dims, self.dims.element, rows.part(groups)
        if checkpointing:  # of one micro-batch at a time, but for the inputs of the blocks
            rows, starts = part, rows.new * self.blocks * dims.hidden * element
        shared = Rows(groups, rows.shared)
        attention = self._saved_by_attention(rows) + (self._saved_by_attention(shared) if rows.shared else 0)
        elsewhere = self._saved_elsewhere(rows) + self._saved_elsewhere(shared)
        read = (dims.attended + dims.intermediate) * inputs + 2 * dims.hidden * self.readers
        elsewhere += element * (rows.new + shared.new) * read
        forward = element * (dims.intermediate + 5 * dims.hidden) + 3 * FLOAT32 * dims.hidden
        mlp = max(dims.intermediate, dims.experts_used * (dims.expert + dims.hidden))
        backward = element * (3 * mlp + 2 * dims.hidden + mlp * inputs) + FLOAT32 * dims.hidden
        working = part.new * (max(forward, backward) + 3 * FLOAT32 * self._read) + self._positions(rows)
        numbers = WRITERS * VECTORS_WITH_GRADIENTS * dims.hidden + 4 * self.reader_numbers  # u, a and their gradients
        vectors = self.blocks * numbers * FLOAT32
        if checkpointing:
            return vectors + starts + max(attention + elsewhere + working, head)
        # The first block's attention has no operator before it but those of readers: only norms after its writer need a gradient.
        first = attention - (rows.new + shared.new) * FLOAT32 * (dims.normalized - 2 * dims.hidden)
        first *= not self.readers
        unused = self.last * self._saved_elsewhere(shared)
        saved = self.blocks * (elsewhere + attention) - self.embedding * first - unused
        return vectors + saved + max(working, head)

    def head(self, rows: Rows, places: int, at_once: int, per_logit: int) -> int:
        """Bytes of the logits at `places` places of the rows, `at_once` at a time, with the hidden states that they come from."""
        dims, element = self.dims, self.dims.element
        hidden = element * dims.hidden * (rows.new + places) + 3 * INT64 * places + self._ids(rows)
        return hidden + min(places, at_once) * dims.vocabulary * (element + per_logit)

    def log_probs(self, rows: Rows, places: int, at_once: int) -> int:
        """Bytes as `head`, of log-probabilities: logits in float32, their log-softmax, and that of the chunk before."""
        tensors = 1 + (self.dims.element != FLOAT32) + (places > at_once)
        return self.head(rows, places, at_once, tensors * FLOAT32)


def rows_with_gradients(
    dims: ModelDims, budget: int, tokens: int, own: int, *, on_cpu: bool, inputs: bool = False, readers: bool = False
) -> tuple[int, bool]:
    """Return the rows of a pass with gradients in `budget` bytes (at least 1), and whether it needs gradient checkpointing.

    Args:
        dims: the model's dimensions.
        budget: bytes.
        tokens: of the longest row.
        own: of these, the tokens after the shared prefix.
        on_cpu: whether the model runs on the CPU.
        inputs: whether operators read the writers' inputs.
        readers: whether readers have operators.
    """
    memory = PassMemory(dims, dims.blocks, readers=readers)

    def row(checkpointing: bool) -> int:
        return memory.gradients(Rows(1, tokens), checkpointing=checkpointing, inputs=inputs)

    whole = budget // row(checkpointing=False)
    if whole >= FEWEST_ROWS:
        enough = max(FEWEST_ROWS, CPU_TOKENS_WITH_GRADIENTS // own) if on_cpu else whole
        return min(whole, enough), False
    return max(1, budget // row(checkpointing=True)), True

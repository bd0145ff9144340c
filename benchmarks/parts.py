"""Parts of a step, each alone: attention, the vocabulary head, an adapted layer; and scoring."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.measure import Results, Task
from cocoa_pl.attention import Policy, attend, dense_mask, make_plan
from cocoa_pl.attention.command import load_policy
from cocoa_pl.attention.kernels import chosen
from cocoa_pl.evaluation.scoring import rank_positives
from cocoa_pl.losses import masked_next_token
from cocoa_pl.models.dora import make_lean, shared_norms

RANK, ALPHA = 8, 64  # of the released scripts' adapters
IGNORED = -100  # cross_entropy's own mark


def masked_head(
    *,
    tokens: int,
    masked: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Task:
    """The loss of hidden tokens and its gradient at the hidden states; the vocabulary's weights are
    frozen, as under adapters.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(device, dtype) / width**0.5
    places = 1 + torch.randperm(tokens - 1, generator=generator)[:masked]
    targets = torch.randint(vocabulary, (masked,), generator=generator)
    labels = torch.full((tokens,), IGNORED).index_copy(0, places - 1, targets).to(device)
    rows, targets = (places - 1).to(device), targets.to(device)  # as data workers know them

    def ours() -> Results:
        losses, _ = masked_next_token(linear(hidden.index_select(0, rows), weight), targets)
        loss = losses.mean()
        return {"loss": [loss.detach()], "gradients": [*torch.autograd.grad(loss, hidden)]}

    def peer() -> Results:
        logits = linear(hidden, weight).float()
        loss = cross_entropy(logits, labels, ignore_index=IGNORED)
        return {"loss": [loss.detach()], "gradients": [*torch.autograd.grad(loss, hidden)]}

    return Task(tokens, ours, peer)


def attention_bridge(
    *,
    samples: int,
    lengths: tuple[int, int],
    heads: tuple[int, int, int],
    layers: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Task:
    """EOS-bridged attention, forward and backward, from lengths on: the plan, or the mask, is made
    in every run, as every step has other lengths.

    Args:
        lengths: median tokens of CONTEXT and TARGET, which are log-normal with a spread of 0.6.
        heads: of queries, of keys and values, and their width.
        layers: calls that share the plan, or the mask.
    """
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(0.6 * torch.randn(samples, 2, generator=generator))
    context, target = (spread * torch.tensor(lengths)).round().long().clamp(min=1).T
    segments = torch.stack([context, torch.ones_like(context), target], dim=1)  # (S, 3)
    totals = segments.sum(1)
    policy, longest, width = load_policy("eos_bridge"), int(totals.max()), heads[2]

    def normal(count: int) -> Tensor:
        return torch.randn(int(totals.sum()), count, width, generator=generator).to(device, dtype)

    real = torch.arange(longest, device=device) < totals.to(device)[:, None]  # (S, N)

    def pad(rows: Tensor) -> Tensor:
        """(T, H, D) -> (S, H, N, D)"""
        padded = rows.new_zeros(samples, longest, *rows.shape[1:])
        padded[real] = rows.detach()
        return padded.transpose(1, 2).contiguous()

    packed = [normal(count).requires_grad_() for count in (heads[0], heads[1], heads[1])]
    above = normal(heads[0])  # gradient of the output
    dense = [pad(states).requires_grad_() for states in packed]
    dense_above = pad(above).transpose(1, 2)  # transformers gives (S, N, H, D)
    kernel = chosen("auto", device=device, dtype=dtype, head_width=width)

    def ours() -> Results:
        plan, (q, k, v) = make_plan(policy, segments).prepared(kernel).to(device), packed
        for _ in range(layers):
            output = attend(q, k, v, plan, kernel=kernel, scale=width**-0.5)
            gradients = torch.autograd.grad(output, packed, above)
        return {"output": [output.detach()], "gradients": [*gradients]}

    groups: Any = SimpleNamespace(num_key_value_groups=heads[0] // heads[1], is_causal=False)

    def peer() -> Results:
        mask, (q, k, v) = dense_masks(policy, segments).to(device), dense
        for _ in range(layers):
            output, _ = sdpa_attention_forward(groups, q, k, v, mask, scaling=width**-0.5)
            gradients = torch.autograd.grad(output, dense, dense_above)
        rows = [states.transpose(1, 2)[real] for states in gradients]
        return {"output": [output.detach()[real]], "gradients": rows}

    return Task(samples, ours, peer)


def dense_masks(policy: Policy, segment_lengths: Tensor) -> Tensor:
    """Of rows padded on the right to the longest, (S, 1, N, N) bool, True where a token sees
    another. Padding sees a row's first token: a row that sees nothing is NaN on a GPU.

    Args:
        segment_lengths: (S, 3) int64.
    """
    longest = int(segment_lengths.sum(1).max())
    masks = torch.zeros(len(segment_lengths), 1, longest, longest, dtype=torch.bool)
    masks[..., 0] = True
    for mask, lengths in zip(masks[:, 0], segment_lengths, strict=True):
        count = int(lengths.sum())
        mask[:count, :count] = dense_mask(policy, lengths[None])
    return masks


def dora(
    *,
    widths: tuple[int, int],
    tokens: int,
    passes: int,
    dropout: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Task:
    """One adapted linear layer through all passes of an optimizer step, forward and backward.

    Args:
        widths: of input and output.
        passes: micro-batches, or batches of a gradient cache, of a step.
        dtype: of the frozen weight and of products; adapters are float32.
    """
    generator = torch.Generator().manual_seed(0)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, use_dora=True, target_modules=["0"]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.Linear(*widths).to(device, dtype)
        theirs: Any = peft.get_peft_model(nn.Sequential(base), config)
    factor = theirs.base_model.model[0].lora_B["default"].weight
    with torch.no_grad():  # as after some training: at first it is zero
        factor.copy_(0.02 * torch.randn(factor.shape, generator=generator))
    own = copy.deepcopy(theirs)
    make_lean(own, dropout_on_base=False)
    own.base_model.model[0].cast_input_dtype_enabled = False  # as `LowRank` sets it
    inputs = [
        torch.randn(tokens, widths[0], generator=generator).to(device, dtype).requires_grad_()
        for _ in range(passes)
    ]
    above = torch.randn(tokens, widths[1], generator=generator).to(device, dtype)

    def step(model: nn.Module) -> Results:
        leaves = [*(p for p in model.parameters() if p.requires_grad), *inputs]
        for leaf in leaves:
            leaf.grad = None
        for x in inputs:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                output = model(x)
            output.backward(above.to(output.dtype))
        if dropout:
            return {}
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        return {"output": [output.detach()], "gradients": gradients}

    def ours() -> Results:
        with shared_norms(own):
            return step(own)

    return Task(passes * tokens, ours, lambda: step(theirs))


def scoring(*, rows: int, pool: int, candidates: int, width: int, device: torch.device) -> Task:
    """nDCG@10 from vectors that are there; each row has candidates of its own, the positive first.

    On the processor of any machine.

    Args:
        pool: candidates in all.
        candidates: of each row.
    """
    from datasets import Dataset
    from mteb._evaluators.retrieval_evaluator import RetrievalEvaluator
    from mteb.models.search_wrappers import SearchEncoderWrapper
    from mteb.similarity_functions import cos_sim
    from mteb.timing import TimingStack
    from mteb.types import PromptType

    from cocoa_pl.for_mteb.digits import DigitScenes

    rng = np.random.default_rng(0)

    def unit(vectors: Any) -> Any:
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    documents = unit(rng.normal(size=(pool, width)))
    index = [rng.permutation(pool)[:candidates] for _ in range(rows)]
    noise = unit(rng.normal(size=(rows, width))) * rng.uniform(0, 12, (rows, 1))
    queries = unit(documents[[own[0] for own in index]] + noise)

    def ours() -> Results:
        ranks = rank_positives(
            queries, documents, query_index=np.arange(rows), candidate_index=index
        ).official
        gains = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0)
        return {"nDCG@10": [torch.from_numpy(gains)]}

    def given(_: object, *, prompt_type: PromptType, **__: Any) -> Any:
        return queries if prompt_type == PromptType.query else documents

    encoder: Any = SimpleNamespace(encode=given, similarity=cos_sim, mteb_model_meta=None)
    ids = {"q": [f"q{n}" for n in range(rows)], "d": [f"d{n}" for n in range(pool)]}
    top_ranked = {f"q{n}": [ids["d"][place] for place in own] for n, own in enumerate(index)}
    relevant = {f"q{n}": {f"d{own[0]}": 1} for n, own in enumerate(index)}
    corpus, asked = (Dataset.from_dict({"id": ids[kind]}) for kind in ("d", "q"))
    # Of pictures alone mteb prepares nothing, so that what is timed is its search and its scores.
    metadata = DigitScenes.metadata.model_copy(update={"category": "i2i", "modalities": ["image"]})
    options: Any = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default"}

    def peer() -> Results:
        evaluator = RetrievalEvaluator(
            corpus, asked, top_ranked=top_ranked, top_k=10, timer=TimingStack(), **options
        )
        found = evaluator(SearchEncoderWrapper(encoder), encode_kwargs={"show_progress_bar": False})
        scores = evaluator.evaluate(relevant, found, k_values=[10]).all_scores
        return {"nDCG@10": [torch.tensor([scores[name]["ndcg_cut_10"] for name in ids["q"]])]}

    return Task(rows, ours, peer)

"""MiniLM-L6, sentence embeddings: two inputs, one of them a mask, and any batch size.

    python examples/embeddings.py

Compares the embeddings of 24 sentences before and after by their cosine, and by what they are for: finding
the sentence that says the same thing.
"""

from __future__ import annotations

import argparse

import networks
import torch

import graphprune


def main(rounds: int) -> None:
    """Compile with an open batch size, then embed one, seven and all sentences."""
    model = networks.minilm()
    ids, mask = networks.tokenise()
    example = {"input_ids": ids[:1], "attention_mask": mask[:1]}
    result = graphprune.optimize(
        model, example_kwargs=example, backend="onnxruntime", dynamic_batch=True, rounds=rounds
    )
    print(result.report)
    print()
    with torch.no_grad():
        before = model(ids, mask)
    for batch in (1, 7, len(ids)):
        after = result(input_ids=ids[:batch], attention_mask=mask[:batch])
        cosine = torch.nn.functional.cosine_similarity(before[:batch], after)
        print(f"batch {batch:>2}: smallest cosine between before and after {float(cosine.min()):.7f}")
    print(f"nearest sentence says the same: {networks.retrieval_accuracy(before):.1%} before, "
          f"{networks.retrieval_accuracy(after):.1%} after")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="calls that are timed")
    main(parser.parse_args().rounds)

"""The same perplexities from an independent emulation: transformers' model, inputs of linear layers pruned by torch.

    python benchmarks/smollm2_torch.py --text wikitext2-test.txt --patterns 4:8,8:16

Needs the extra 'export'. Weights and tokens are those of the ONNX model in --folder; no operator of nmonnx takes part.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from nmonnx.inference.text import encode, load_tokenizer, read_text
from nmonnx.onnx_file.graph import load

WINDOW = 1024
PARTS = {"attn": ("self_attn", "qkvo"), "mlp": ("mlp", ("gate", "up", "down"))}


def main(
    text: Annotated[Path, typer.Option(help="The text to measure on.")],
    folder: Annotated[Path, typer.Option(help="Where the fp32 model lies.")] = Path("nmonnx-demo"),
    patterns: Annotated[str, typer.Option(help="N:M, separated by commas.")] = "2:4,4:8,8:16,16:32,12:16",
    windows: Annotated[int, typer.Option(help="Windows of 1024 tokens.")] = 8,
) -> None:
    model = smollm2(folder / "model.onnx")
    tokenizer = load_tokenizer(beside=folder / "model.onnx")
    rows = encode(tokenizer, read_text(text))[: windows * WINDOW].reshape(windows, WINDOW).astype(np.int64)
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    for pattern in patterns.split(","):
        keep, group = map(int, pattern.split(":"))
        hooks = [m.register_forward_pre_hook(lambda _, x, n=keep, g=group: prune(x[0], n, g)) for m in linears]
        print(f"{pattern}  {perplexity(model, torch.tensor(rows)):.2f}", flush=True)
        for hook in hooks:
            hook.remove()


def smollm2(path: Path) -> LlamaForCausalLM:
    opened = load(path)
    stored = {t.name: opened.tensors.array(t) for t in opened.proto.graph.initializer}
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,  # type: ignore[call-arg]
        tie_word_embeddings=True,
    )
    names = {"model.embed_tokens.weight": "lm_head.MatMul.weight"}
    names |= {"model.norm.weight": f"model.layers.{config.num_hidden_layers}.final_norm_layernorm.weight"}
    for i in range(config.num_hidden_layers):
        for part, (module, roles) in PARTS.items():
            for role in roles:
                names[f"model.layers.{i}.{module}.{role}_proj.weight"] = (
                    f"model.layers.{i}.{part}.{role}_proj.MatMul.weight"
                )
        for norm in ("input_layernorm", "post_attention_layernorm"):
            names[f"model.layers.{i}.{norm}.weight"] = f"model.layers.{i}.{norm}.weight"
    model = LlamaForCausalLM(config).eval()
    state = {ours: torch.tensor(np.ascontiguousarray(stored[theirs].T)) for ours, theirs in names.items()}
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    return model


def prune(x: torch.Tensor, keep: int, group: int) -> tuple[torch.Tensor]:
    groups = x.reshape(-1, group)
    index = groups.abs().topk(keep, dim=-1).indices
    kept = torch.zeros_like(groups).scatter(-1, index, groups.gather(-1, index))
    return (kept.reshape(x.shape),)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    losses = [torch.nn.functional.cross_entropy(model(r[None]).logits[0, :-1], r[1:]).item() for r in rows]
    return math.exp(sum(losses) / len(losses))


if __name__ == "__main__":
    typer.run(main)

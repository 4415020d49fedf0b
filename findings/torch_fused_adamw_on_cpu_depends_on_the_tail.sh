#!/usr/bin/env bash
# PyTorch 2.13.0 on x86-64 CPUs, seen on 2026-11-30: `AdamW(fused=True)` rounds the last numbers of a tensor in another way
# than those before them. The same weight with the same gradient gets another value, or other moments, by a unit in the last
# place, at the end of a tensor than in its middle (146 of 59,700 numbers); the loop (`fused=False, foreach=False`) gives one
# value everywhere. Copies of a weight in flat buffers of different lengths, as ZeRO's are beside uneven shards, drift apart.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6
"$work/venv/bin/python" - <<'PY'
import torch

torch.manual_seed(0)


def stepped(values: torch.Tensor, gradient: torch.Tensor, **how: bool) -> torch.Tensor:
    """[3, size]: the weights, and AdamW's two moments of them."""
    weight = torch.nn.Parameter(values.clone())
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.1, **how)
    for scale in (1.0, 0.5, 2.0):
        weight.grad = gradient * scale
        optimizer.step()
    state = optimizer.state[weight]
    return torch.stack([weight.detach(), state["exp_avg"], state["exp_avg_sq"]])


different = {"fused": 0, "loop": 0}
for size in range(1, 200):
    values, gradient = torch.randn(256), torch.randn(256)
    for name, how in (("fused", dict(fused=True)), ("loop", dict(fused=False, foreach=False))):
        long, short = stepped(values, gradient, **how), stepped(values[:size], gradient[:size], **how)
        different[name] += int((long[:, :size] != short).sum())
print(f"of 59,700 weights and moments, other values in a shorter tensor: {different}")
assert different["fused"] > 0 and different["loop"] == 0, "it does not happen any more"
PY

"""Our AdamW, schedule and all, against PyTorch's on the same gradients."""

import jax.numpy as jnp
import numpy as np
import optax
import torch

from uta_jax.optimizer import AdamW, make_optimizer, schedule

RECIPE = AdamW(
    lr=1e-2, total_steps=8, warmup_steps=2, start_lr=1e-4, b1=0.9, b2=0.98, weight_decay=0.1
)


def test_five_steps_equal_torch_adamw():
    """A kernel that decays and a bias that does not, as PyTorch's parameter groups have it."""
    rng = np.random.default_rng(0)
    start = {
        "kernel": rng.normal(size=(16, 8)).astype(np.float32),
        "bias": rng.normal(size=8).astype(np.float32),
    }
    ours = {name: jnp.asarray(value) for name, value in start.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    optimizer, rate = make_optimizer(RECIPE), schedule(RECIPE)
    state = optimizer.init(ours)
    torch_optimizer = torch.optim.AdamW(
        [
            {"params": [theirs["kernel"]], "weight_decay": RECIPE.weight_decay},
            {"params": [theirs["bias"]], "weight_decay": 0.0},
        ],
        betas=(RECIPE.b1, RECIPE.b2),
        eps=RECIPE.eps,
    )
    for step in range(5):
        grads = {n: rng.normal(size=v.shape).astype(np.float32) for n, v in start.items()}
        updates, state = optimizer.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        for group in torch_optimizer.param_groups:
            group["lr"] = float(rate(step))
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[name])
        torch_optimizer.step()
    for name, parameter in theirs.items():
        theirs_now = parameter.detach().numpy()
        assert np.abs(theirs_now - start[name]).max() > 1e-2, "nothing moved"
        np.testing.assert_allclose(ours[name], theirs_now, rtol=0, atol=1e-6)

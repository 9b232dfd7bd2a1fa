"""Training steps with gradients that are not finite, on the CPU and on a GPU."""

import copy

import numpy as np
import torch
from test_engine import SCHEDULE, batch, make_config, small_mae

BAD_STEP = 2  # counted from 0


def snapshot(engine):
    """Copy everything that an update changes on this process: weights, master weights, moments and step counts."""
    states = engine._engine.basic_optimizer.state
    weights = [getattr(p, "ds_tensor", p).detach().clone() for p in engine.model.parameters()]
    return weights, [p.detach().clone() for p in states], [copy.deepcopy(dict(states[p])) for p in states]


def same(one, other):
    """Return whether two snapshots are equal bit for bit."""
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a, b, strict=True):
            pairs = [(x[key], y[key]) for key in x] if isinstance(x, dict) else [(x, y)]
            if not all(torch.equal(torch.as_tensor(p), torch.as_tensor(q)) for p, q in pairs):
                return False
    return True


def take_steps(engine, world, config, steps, bad=None):
    """Train, and return the losses. At ``BAD_STEP`` the gradient norm follows them.

    Args:
        bad: (micro-batch, factor): the last rank multiplies the loss of this micro-batch of ``BAD_STEP`` by the factor.
    """
    accumulation, losses = config.accumulation(world.size), []
    for step in steps:
        images, noise = (t.to(world.device) for t in batch(step))
        for micro in range(accumulation):
            first = (micro * world.size + world.rank) * config.train.micro_batch
            part = slice(first, first + config.train.micro_batch)
            is_bad = bad and step == BAD_STEP and (micro, world.rank) == (bad[0], world.size - 1)
            hook = None
            if is_bad:
                hook = engine.model.register_forward_hook(lambda _, __, out: out._replace(loss=out.loss * bad[1]))
            losses.append(engine.forward_backward(images[part], noise[part]).item())
            if hook:
                hook.remove()
            norm = engine.step(SCHEDULE.lr(step), return_norm=step == BAD_STEP and micro + 1 == accumulation)
            if step == BAD_STEP and micro + 1 == accumulation:
                losses.append(norm)
    return losses


def train_with_a_bad_step(settings, factor, micro, folder):
    """Train with each setting through a step with non-finite gradients.

    Returns, for each setting:
        Whether the bad step changed nothing; (skipped steps before, after, last_step_skipped, gradient norm); whether the
        following steps equal those of a run without the bad step; whether they also do after loading a checkpoint into the
        same engine; and whether losses and weights are finite.
    """
    from scale_mae.distributed.process_group import process_group
    from scale_mae.engine.deepspeed import Engine

    results = []
    with process_group() as world:
        for number, setting in enumerate(settings):
            config, model = make_config(**setting), small_mae()
            engine = Engine(model, config, world)
            take_steps(engine, world, config, range(BAD_STEP))
            engine.save(folder / str(number), {"step": BAD_STEP})
            before, count = snapshot(engine), engine.skipped_steps
            norm = take_steps(engine, world, config, [BAD_STEP], bad=(micro, factor))[-1]
            unchanged = same(before, snapshot(engine))
            skipped = count, engine.skipped_steps, float(engine.last_step_skipped), norm
            after = take_steps(engine, world, config, range(BAD_STEP + 1, BAD_STEP + 3))
            clean = Engine(small_mae(), config, world)
            take_steps(clean, world, config, range(BAD_STEP))
            expected = take_steps(clean, world, config, range(BAD_STEP + 1, BAD_STEP + 3))
            as_without = after == expected and same(snapshot(engine), snapshot(clean))
            world.barrier()
            engine.load(folder / str(number))
            again = take_steps(engine, world, config, range(BAD_STEP + 1, BAD_STEP + 3))
            as_without_after_load = again == expected and same(snapshot(engine), snapshot(clean)) and engine.skipped_steps == 1
            finite = bool(np.isfinite(after).all()) and engine.weights_are_finite()
            results.append((unchanged, skipped, as_without, as_without_after_load, finite))
    return results

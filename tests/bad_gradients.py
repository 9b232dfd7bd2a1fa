"""Training steps with gradients that are not finite, on the CPU and on a GPU."""

import copy

import numpy as np
import torch
from test_engine import SCHEDULE, batch, make_config, small_mae

BAD = 2  # the step, counted from 0


def snapshot(engine):
    """All that an update changes, on this process: weights, masters, moments, counts."""
    states = engine._engine.basic_optimizer.state
    weights = [getattr(p, "ds_tensor", p).detach().clone() for p in engine.model.parameters()]
    return weights, [p.detach().clone() for p in states], [copy.deepcopy(dict(states[p])) for p in states]


def same(one, other):
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a, b, strict=True):
            pairs = [(x[key], y[key]) for key in x] if isinstance(x, dict) else [(x, y)]
            if not all(torch.equal(torch.as_tensor(p), torch.as_tensor(q)) for p, q in pairs):
                return False
    return True


def take_steps(engine, ranks, config, steps, bad=None):
    """Losses of some steps; in step ``bad`` the second rank's gradient is ``value`` in one micro-batch."""
    accumulation, losses = config.accumulation(ranks.size), []
    for step in steps:
        images, noise = (t.to(ranks.device) for t in batch(step))
        for micro in range(accumulation):
            first = (micro * ranks.size + ranks.rank) * config.train.micro_batch
            part = slice(first, first + config.train.micro_batch)
            spoilt = bad and step == BAD and (micro, ranks.rank) == (bad[0], ranks.size - 1)
            hook = (
                engine.model.register_forward_hook(lambda _, __, out: out._replace(loss=out.loss * bad[1])) if spoilt else None
            )
            losses.append(engine.forward_backward(images[part], noise[part]).item())
            if hook:
                hook.remove()
            norm = engine.step(SCHEDULE.lr(step), return_norm=step == BAD and micro + 1 == accumulation)
            if step == BAD and micro + 1 == accumulation:
                losses.append(norm)
    return losses


def leave_out(settings, value, micro, folder):
    """Of each setting: whether the bad step changed anything, the counts, whether what followed equals a run without it, at
    once and again after going back in place."""
    from scale_mae.distributed.process_group import process_group
    from scale_mae.engine.deepspeed import Engine

    told = []
    with process_group() as ranks:
        for number, setting in enumerate(settings):
            config, model = make_config(**setting), small_mae()
            engine = Engine(model, config, ranks)
            take_steps(engine, ranks, config, range(BAD))
            engine.save(folder / str(number), {"step": BAD})
            before, count = snapshot(engine), engine.skipped_steps
            norm = take_steps(engine, ranks, config, [BAD], bad=(micro, value))[-1]
            unchanged, skipped = (
                same(before, snapshot(engine)),
                (count, engine.skipped_steps, float(engine.last_step_skipped), norm),
            )
            after = take_steps(engine, ranks, config, range(BAD + 1, BAD + 3))
            clean = Engine(small_mae(), config, ranks)
            take_steps(clean, ranks, config, range(BAD))
            expected = take_steps(clean, ranks, config, range(BAD + 1, BAD + 3))
            as_without = after == expected and same(snapshot(engine), snapshot(clean))
            ranks.barrier()
            engine.load(folder / str(number))
            again = take_steps(engine, ranks, config, range(BAD + 1, BAD + 3))
            as_before = again == expected and same(snapshot(engine), snapshot(clean)) and engine.skipped_steps == 1
            finite = bool(np.isfinite(after).all()) and engine.weights_are_finite()
            told.append((unchanged, skipped, as_without, as_before, finite))
    return told

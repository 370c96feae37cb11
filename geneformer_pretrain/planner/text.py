"""A plan in lines for people."""

from geneformer_pretrain.console import amount
from geneformer_pretrain.planner.fitting import GIB, MOST_GPUS, USABLE_SHARE
from geneformer_pretrain.planner.measured import Card
from geneformer_pretrain.planner.plan import EnginePlan, Plan

COLUMNS = "{:2}{:20} {:>10} {:>8} {:>10} {:>10} {:>6} {:>9} {:>10} {:>8}"


def describe(plan: Plan) -> list[str]:
    """Return the lines that `plan` prints."""
    cluster, card = plan.cluster, plan.cluster.card
    nodes = f", {cluster.nodes} nodes of {cluster.gpus_per_node}" if cluster.nodes > 1 else ""
    configured = plan.configured
    lines = [
        f"model        {plan.num_parameters:,} parameters",
        f"FLOPs        {_si(plan.flops_per_token)} a token, forward and backward: "
        "3 x [layers x (2 (4 H^2 + 2 H F) + 4 H L) + 2 m (H^2 + H V)]",
        f"             L = sum(n^2) / sum(n) = {plan.attended:,.0f} tokens that a token attends to, m = share masked",
        f"corpus       {amount(plan.cells, 'cell')}, {_si(plan.tokens)} tokens ({plan.corpus})",
        f"GPUs         {cluster.gpus} x {card.name}{nodes}",
        f"step         {plan.tokens_per_step:,.0f} tokens, {amount(round(plan.cells_per_step), 'cell')}: "
        f"{cluster.gpus} x {amount(plan.accumulation, 'micro-batch', 'micro-batches')} of "
        f"{plan.micro_batch_tokens:,} tokens",
        f"epoch        {_epoch(plan)}",
        f"checkpoint   {_bytes(plan.checkpoint_bytes)} each; the run's folder {_bytes(plan.disk_bytes)}, "
        f"the corpus in data.cache_dir {_bytes(plan.cache_bytes)}",
        *_saving(configured),
        *_memory(configured, card),
        "",
        COLUMNS.format("", "engine", "memory", "largest", "step", "tokens/s", "MFU", "epoch", "GPU-hours", "cost"),
        COLUMNS.format("", "", "a GPU", "micro-b.", "", "and GPU", "", "", "an epoch", "an epoch"),
        *(_row(engine) for engine in plan.engines),
        "",
    ]
    for engine in plan.engines:
        lines.append(f"{engine.engine}: {engine.step.basis}")
    if not configured.fits:
        lines.append(
            f"! {configured.engine} does not fit: {configured.memory.total / GIB:.1f} GiB, and {USABLE_SHARE:.0%} of "
            f"{card.memory_gib} GiB may be planned with. {_remedy(plan)}"
        )
    if any(not engine.step.is_measured for engine in plan.engines):
        lines += [
            "~ estimated from datasheets and constants fitted to one to four H100s and H200s. On other cards,",
            "  and between nodes, it may be far off: time 100 steps before you book.",
        ]
    cost = "" if configured.cost_of_run is None else f", cost {configured.cost_of_run:,.0f}"
    lines.append(
        f"The whole run, {configured.engine}: {amount(plan.num_train_steps, 'step')}, "
        f"{_time(3600 * configured.gpu_hours_of_run / cluster.gpus)}, {configured.gpu_hours_of_run:,.1f} "
        f"GPU-hours{cost}."
    )
    return lines


def _epoch(plan: Plan) -> str:
    """Say how long an epoch is, and how many the run has."""
    epochs = plan.num_train_steps / plan.steps_per_epoch
    of_run = f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.2g}" if epochs >= 1e-3 else "less than 0.001"
    run = f"the run has {plan.num_train_steps:,}, {of_run} epoch{'' if of_run == '1' else 's'}"
    if plan.steps_per_epoch >= 1:
        return f"{amount(round(plan.steps_per_epoch), 'step')}; {run}"
    packs = plan.cluster.gpus * plan.accumulation
    filled = round(plan.steps_per_epoch * packs)
    return (
        f"less than one step; {run}\n             all cells fill {filled:,} of the {packs:,} micro-batches of a step, "
        f"which reads each cell {packs / filled:,.1f} times"
    )


def _saving(engine: EnginePlan) -> list[str]:
    saving = engine.saving
    lines = [
        f"saving       every {_time(saving.interval_seconds)}: training stands still for "
        f"{_time(saving.stop_seconds)} each time, {saving.share:.2%} of the time",
        f"             (the first after a start {_time(saving.first_stop_seconds)}, while {_bytes(saving.host_bytes)} "
        f"of each rank's host memory are pinned); writing takes {_time(saving.background_seconds)}",
    ]
    if saving.background_seconds > saving.interval_seconds:
        lines.append(
            "             the next save is due before the last is written: raise training.save_every_n_steps, or set "
            "it to null"
        )
    return lines


def _memory(engine: EnginePlan, card: Card) -> list[str]:
    memory = engine.memory
    parts = {
        "weights": memory.weights,
        "optimizer": memory.optimizer,
        "gradients": memory.gradients,
        "gathered and cast weights": memory.working,
        "activations": memory.activations,
        "logits": memory.logits,
    }
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
    return [
        f"memory       about {memory.total / GIB:.1f} of {card.memory_gib} GiB a GPU ({engine.engine})",
        f"             {listed}",
    ]


def _row(engine: EnginePlan) -> str:
    return COLUMNS.format(
        "> " if engine.is_configured else "",
        engine.engine,
        f"{engine.memory.total / GIB:.1f} GiB" + ("" if engine.fits else " !"),
        engine.largest_micro_batch or "none",
        f"{1e3 * engine.step.seconds:,.1f} ms" + ("" if engine.step.is_measured else " ~"),
        f"{engine.tokens_per_second_per_gpu:,.0f}",
        f"{engine.model_flops_utilization:.0%}",
        _time(3600 * engine.hours_per_epoch),
        f"{engine.gpu_hours_per_epoch:,.1f}",
        "-" if engine.cost_per_epoch is None else f"{engine.cost_per_epoch:,.0f}",
    )


def _remedy(plan: Plan) -> str:
    planned = plan.cluster.gpus
    none = "No engine, micro-batch or recomputation makes it fit on"
    if not plan.remedies:
        return f"{none} up to {max(planned, MOST_GPUS):,} of these GPUs: use GPUs with more memory."
    gpus = plan.remedies[0].gpus
    ways = ", or with ".join(" ".join(remedy.settings) for remedy in plan.remedies)
    if gpus == planned:
        return f"It fits with {ways}."
    return f"{none} {planned} of these GPUs; {gpus} are enough: --gpus {gpus} with {ways}."


def _si(value: float) -> str:
    for size, unit in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def _bytes(value: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e6:.3g} MB" if value >= 1e6 else f"{value / 1e3:,.0f} kB"


def _time(seconds: float) -> str:
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:,.1f} d"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"

"""A plan as tables and sentences for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cocoa_pl.planning import flops
from cocoa_pl.planning.flops import Cost
from cocoa_pl.planning.plan import Plan
from cocoa_pl.planning.verdict import GIB, ROOM

PASSES = {
    "forward": "forward",
    "backward": "backward",
    "recomputed": "recomputed (checkpointing)",
    "cached": "first pass (gradient cache)",
}


def print_plan(plan: Plan, console: Console) -> None:
    """Print the whole plan, the verdict last."""
    console.print(f"[bold]{escape(plan.title)}[/bold]", soft_wrap=True)
    console.print(_setup_line(plan), highlight=False)
    console.print(_parameters(plan))
    console.print(_memory(plan))
    console.print(_operations(plan))
    console.print(_time(plan))
    console.print(_sizes("Disk", plan.disk))
    console.print(_sizes("Memory of a host", plan.host_memory))
    console.print("Assumed, not measured:")
    for line in assumptions(plan):
        console.print(f"- {line}", highlight=False)
    for line in conclusion(plan):
        console.print(line, highlight=False)


def conclusion(plan: Plan) -> Iterator[str]:
    """Whether it fits, and if not, what would."""
    needed = {s.stage.name: sum(plan.hardware.needed(s.memory).values()) for s in plan.stages}
    name, most = max(needed.items(), key=lambda pair: pair[1])
    room = f"{most:.1f} of {plan.hardware.memory_gib:g} GiB in {name}"
    if plan.fits:
        tight = most > ROOM * plan.hardware.memory_gib
        how = "It fits, but hardly" if tight else "It fits"
        yield f"[green]{how}[/green]: {room}, the fullest stage."
        return
    yield f"[red]It does not fit[/red]: {room}."
    for remedy in plan.remedies:
        yield f"It would with  [bold]{' '.join(remedy.overrides)}[/bold]  ({remedy.note})"
    if not plan.remedies:
        yield "No change that is known here makes it fit; take a smaller model."


def assumptions(plan: Plan) -> list[str]:
    """What the numbers rest on, one sentence each."""
    lengths, hardware = plan.lengths, plan.hardware
    height, width = lengths.grid
    context = "CUDA and NCCL" if plan.setup.on_gpu else "Python and torch"
    rows = "unknown" if plan.rows is None else f"{plan.rows:,}"
    return [
        f"{lengths.text} text tokens a side, {lengths.images_per_query:g} images a query and "
        f"{lengths.images_per_positive:g} a positive, {height} x {width} = {lengths.image_tokens} "
        f"visual tokens an image, {lengths.negatives} hard negatives; all rows alike (lengths.*)",
        f"rows of training data: {rows} (lengths.rows); {lengths.row_bytes} bytes each in memory, "
        f"{lengths.image_bytes / 1024:.0f} KiB an image on disk",
        f"{plan.mfu:.0%} of {hardware.name}'s dense peak (mfu); training steps alone, without "
        "validation, evaluation, start-up and waiting for data",
        f"{hardware.context_gib:g} GiB for {context}, {hardware.slack:.0%} of activations lost "
        "to gaps (assume.*); an attention kernel that keeps no table of scores",
        "operations and bytes are checked against small models on the CPU; peaks on a GPU are not "
        "measured (docs/plan.md)",
    ]


def _setup_line(plan: Plan) -> str:
    setup = plan.setup
    spread = "FSDP2" if setup.sharded else "DDP" if setup.gpus > 1 else "one process"
    method = "full fine-tuning"
    if setup.adapter is not None:
        method = f"{'DoRA' if setup.adapter.use_dora else 'LoRA'} of rank {setup.adapter.rank}"
    products = "bfloat16" if setup.width == 2 else "float32"
    saves = "with" if setup.checkpointing else "without"
    return (
        f"{setup.gpus} x {plan.hardware.name} ({spread}), {method}, products in {products}, "
        f"{saves} gradient checkpointing"
    )


def _parameters(plan: Plan) -> Table:
    table = _table("Parameters", ["millions", "share"])
    whole = plan.parameters["model"]
    for name, count in plan.parameters.items():
        table.add_row(name, f"{count / 1e6:,.2f}", f"{count / whole:.2%}")
    return table


def _memory(plan: Plan) -> Table:
    table = _table("Memory of each GPU, GiB", [s.stage.name for s in plan.stages])
    needed = [plan.hardware.needed(stage.memory) for stage in plan.stages]
    for part in _union(needed):
        _add(table, part, [_number(one.get(part, 0.0)) for one in needed])
    table.add_section()
    _add(table, "at the fullest moment", [_number(sum(one.values())) for one in needed])
    return table


def _operations(plan: Plan) -> Table:
    costs = [stage.costs for stage in plan.stages]
    scale, unit = _scale(min(_whole(one) for one in costs))
    table = _table(f"Operations of a step on each GPU, {unit}", [s.stage.name for s in plan.stages])
    for part in _union(costs):
        values = [one.get(part, Cost()).total / scale for one in costs]
        _add(table, part, [_number(value) for value in values])
    table.add_section()
    for attribute, name in PASSES.items():
        values = [sum(getattr(c, attribute) for c in one.values()) / scale for one in costs]
        if any(values):
            _add(table, name, [_number(value) for value in values])
    table.add_section()
    _add(table, "all", [_number(_whole(one) / scale) for one in costs])
    return table


def _time(plan: Plan) -> Table:
    table = _table(f"Time at {plan.mfu:.0%} of peak", [*(s.stage.name for s in plan.stages), "all"])
    gpus, stages = plan.setup.gpus, plan.stages
    hours = [plan.hours(stage) for stage in stages]
    seconds = [stage.seconds(plan.hardware.tflops, plan.mfu) for stage in stages]
    _add(table, "tokens a step, all GPUs", [f"{s.tokens * gpus:,}" for s in stages] + [""])
    _add(table, "chunks a step, each GPU", [str(len(s.load.works)) for s in stages] + [""])
    _add(table, "seconds a step", [*(_number(value) for value in seconds), ""])
    _add(table, "steps", [f"{s.steps:,}" for s in stages] + [f"{sum(s.steps for s in stages):,}"])
    _add(table, "hours", [_number(value) for value in [*hours, sum(hours)]])
    _add(table, "GPU hours", [_number(value * gpus) for value in [*hours, sum(hours)]])
    return table


def _sizes(title: str, sizes: Mapping[str, int]) -> Table:
    table = _table(title, ["GiB"])
    for name, size in sizes.items():
        table.add_row(name, _number(size / GIB))
    table.add_section()
    table.add_row("all", _number(sum(sizes.values()) / GIB))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _add(table: Table, name: str, values: Sequence[str]) -> None:
    table.add_row(name, *values)


def _union(parts: Sequence[Mapping[str, object]]) -> list[str]:
    """Names in the order in which they first occur; operations in their own order."""
    names = list(dict.fromkeys(name for one in parts for name in one))
    return [n for n in flops.PARTS if n in names] + [n for n in names if n not in flops.PARTS]


def _whole(costs: Mapping[str, Cost]) -> float:
    return sum(cost.total for cost in costs.values())


def _scale(value: float) -> tuple[float, str]:
    units = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))
    return next((unit for unit in units if value >= unit[0]), units[-1])


def _number(value: float) -> str:
    """Three significant digits, and nothing for what is not there."""
    if value == 0:
        return ""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.01 else "< 0.01"

"""A plan as text: what each device holds and receives, and the limit."""

from keras_t5gemma.planning.costs import Plan
from keras_t5gemma.planning.options import PlanOptions
from keras_t5gemma.planning.planner import read_config, read_length
from keras_t5gemma.utils.progress import to_terminal

Row = tuple[str, str, str]  # Name, bytes, note.


def print_plan(o: PlanOptions, plan: Plan) -> None:
    """Print a plan: tables on a terminal, aligned text otherwise.

    Args:
        o: options of the plan.
        plan: what `plan` returned for them.
    """
    print("\n".join(header(o, plan)))
    for title, rows in sections(o, plan).items():
        if to_terminal():
            _print_table(title, rows)
        else:
            print(f"\n{title}")
            for name, size, note in rows:
                print(f"  {name:<30}{size:>12}  {note}".rstrip())
    for line in plan.advice:
        print(f"Would fit: {line}")


def header(o: PlanOptions, plan: Plan) -> list[str]:
    """Lines that name model, devices, layout and training."""
    config, (source, target) = read_config(o.preset), read_length(o.length)
    name = "model" if o.preset is config else str(o.preset)
    optimizer = o.optimizer if isinstance(o.optimizer, str) else o.optimizer.name
    trained = f"LoRA of rank {o.lora_rank}" if o.lora_rank else "all weights trained"
    if o.quantize:
        trained += f" on {o.quantize} weights"
    data, model = plan.mesh["data"], plan.mesh["model"]
    group = "device" if model == 1 else f"group of {model} devices"
    lines = [
        f"{name}: {config.count_params():,} parameters, {trained}",
        f"{o.devices} devices, mesh data {data} x model {model}, strategy "
        f"{plan.strategy}",
        f"batch {o.batch} ({o.batch // data} per {group}), length {source} + {target} "
        f"tokens, {o.dtype}, {optimizer}",
    ]
    if max(source, target) > config.max_positions:
        lines.append(
            f"Longer than the model's {config.max_positions} positions: it never saw "
            "such distances."
        )
    return lines


def sections(o: PlanOptions, plan: Plan) -> dict[str, list[Row]]:
    """Rows of the tables, by title."""
    kept, inputs = _size(plan.activations), _size(plan.activations_rematerialized)
    recomputed = []
    if o.rematerialize:
        activations = inputs, f"rematerialized: block inputs only; {kept} if all kept"
        recomputed = [
            ("step: recomputation", _size(plan.recomputed), "activations of one block")
        ]
        copies = plan.copies_rematerialized, "cast or gathered, one block at a time"
    else:
        activations = kept, f"all kept; {inputs} if rematerialized"
        copies = plan.copies, "cast or gathered, all blocks"
    layout = {
        "data": "a full copy on each device",
        "fsdp": "split over the devices",
        "tensor": "heads and widths split over the axis model",
    }[plan.strategy]
    share = f"{plan.total / plan.memory:.0%} of the limit is used"
    rest = plan.memory - plan.total
    holds: list[Row] = [
        ("weights", _size(plan.weights), layout),
        ("optimizer state", _size(plan.optimizer), layout),
        ("step: gradients", _size(plan.gradients), "of all trained weights"),
        ("step: activations", *activations),
        *recomputed,
        ("step: backward pass", _size(plan.working), "gradients inside one block"),
        ("step: weights for use", _size(copies[0]), copies[1]),
        ("step: logits and loss", _size(plan.logits), "a chunk of the vocabulary"),
        ("peak of a step", _size(plan.step), "not all of its parts exist at once"),
        ("total", _size(plan.total), "weights + optimizer state + peak of a step"),
        ("limit", _size(plan.memory), "fits" if plan.fits else "DOES NOT FIT"),
        ("headroom" if plan.fits else "missing", _size(abs(rest)), share),
    ]
    receives: list[Row] = [
        (k, _size(v), "") for k, v in plan.communication.items() if v
    ]
    if receives:
        receives.append(("total", _size(plan.received), ""))
    else:
        receives = [("nothing", _size(0), "")]
    caches = (_size(plan.caches), "key/value caches for this batch, without training")
    return {
        "Each device holds": holds,
        "Each device receives per step": receives,
        "For generation": [("caches", *caches)],
    }


def _size(count: float) -> str:
    if 0 < count < 1e8:
        return f"{count / 1e6:,.1f} MB"
    return f"{count / 1e9:,.2f} GB"


def _print_table(title: str, rows: list[Row]) -> None:
    import rich
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for row in rows:
        table.add_row(*row, end_section=row[0] in ("optimizer state", "peak of a step"))
    rich.print(table)

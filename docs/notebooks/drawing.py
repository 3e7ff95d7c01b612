"""What the notebooks draw: runs as rows of boxes, tokens as a strip, prefixes as a tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from program import Trajectory

BLUE, ORANGE, GREEN, GREY = "#4878a8", "#e08a3c", "#5a9e6f", "#bbbbbb"
PALETTE = (BLUE, ORANGE, GREEN, "#a05a9e", "#c4a43c", "#3caab0")

plt.rcParams |= {
    "figure.dpi": 80,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "svg.hashsalt": "mmgrpo",
}


def colour_of(value: float, most: float = 1.5) -> tuple:
    """Blue above zero, red below, white at zero; full at `most`."""
    share = 0.5 + 0.5 * max(-1.0, min(1.0, value / most))
    return plt.get_cmap("RdBu")(0.12 + 0.76 * share)


def draw_runs(
    trajectories: Sequence[Trajectory],
    colour: Callable[[int, int], object],
    text: Callable[[int, int], str],
    title: str = "",
    axes: Axes | None = None,
) -> Axes:
    """A row for each run, a box for each call, a unit of width for each sampled token.

    `colour(run, call)` and `text(run, call)` say what a box looks like. How the run ended, and what
    it earned, stands behind it.
    """
    axes = axes or plt.subplots(figsize=(9, 0.55 * len(trajectories) + 0.6))[1]
    widest = 0.0
    for run, trajectory in enumerate(trajectories):
        left = 0.0
        for call, made in enumerate(trajectory.calls):
            width = len(made.completion.token_ids)
            box = Rectangle((left, run - 0.36), width - 0.08, 0.72, color=colour(run, call), ec="k")
            axes.add_patch(box)
            axes.text(left + width / 2, run, text(run, call), ha="center", va="center", fontsize=8)
            left += width
        reward = "no reward" if trajectory.reward is None else f"{trajectory.reward:+.1f}"
        axes.text(left + 0.15, run, f"{reward}  {trajectory.status}", va="center", fontsize=8)
        widest = max(widest, left)
    axes.set(
        xlim=(-0.1, widest + 2.2),
        ylim=(len(trajectories) - 0.4, -0.6),
        xticks=[],
        yticks=range(len(trajectories)),
        yticklabels=[f"run {t.rollout}" for t in trajectories],
        title=title,
    )
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    return axes


def draw_tokens(
    tokens: Sequence[str],
    colours: Sequence[object],
    below: Sequence[str] = (),
    a_line: int = 14,
) -> Axes:
    """Tokens in boxes, `a_line` of them a line, each with a small text below it."""
    lines = -(-len(tokens) // a_line)
    axes = plt.subplots(figsize=(9, 0.62 * lines + 0.2))[1]
    for i, (token, colour) in enumerate(zip(tokens, colours)):
        x, y = i % a_line, i // a_line
        axes.add_patch(Rectangle((x, y), 0.95, 0.52, color=colour, ec="k"))
        axes.text(x + 0.47, y + 0.27, token[:9], ha="center", va="center", fontsize=7)
        if below:
            axes.text(x + 0.47, y + 0.7, below[i], ha="center", va="center", fontsize=6.5)
    axes.set(xlim=(0, a_line), ylim=(lines, -0.05))
    axes.axis("off")
    return axes


def draw_tree(sequences: Sequence[Sequence[str]]) -> Axes:
    """The prefix tree of some sequences: every distinct prefix is one node."""
    ordered = sorted(set(map(tuple, sequences)))
    rows = {
        s[:depth]: row
        for row, s in reversed([*enumerate(ordered)])
        for depth in range(1, len(s) + 1)
    }
    axes = plt.subplots(figsize=(9, 0.5 * len(ordered) + 0.3))[1]
    for prefix, row in rows.items():
        x = len(prefix) - 1
        if x > 0:
            axes.plot([x - 0.1, x], [rows[prefix[:-1]], row], color="k", lw=0.8, zorder=0)
        shared = sum(tuple(s[: x + 1]) == prefix for s in sequences) > 1
        axes.add_patch(
            Rectangle((x, row - 0.3), 0.9, 0.6, color=ORANGE if shared else GREY, ec="k")
        )
        axes.text(x + 0.45, row, prefix[-1], ha="center", va="center", fontsize=8)
    axes.set(xlim=(-0.1, max(map(len, ordered))), ylim=(len(ordered) - 0.5, -0.5))
    axes.axis("off")
    return axes

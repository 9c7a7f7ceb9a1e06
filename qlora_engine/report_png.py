"""The plots of a comparison as PNG files, for papers and chats; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .compare import Run, groups
from .errors import InputError
from .spectrum import Spectrum

FILES = ("size_error.png", "kinds.png", "iterations.png")
SPECTRA = "spectra.png"


def write_png(runs: Sequence[Run], folder: Path, spectra: Sequence[Spectrum] = ()) -> list[Path]:
    """Draw size against error, error by kind of module, error by iteration, and spectra where there are any.

    Returns:
        The files that were written; iterations are left out where no run has any.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("--png needs matplotlib: pip install 'qlora-engine[report]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in zip(FILES, (_sizes, _kinds, _iterations), strict=True):
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        if draw(figure.add_subplot(), runs):
            figure.savefig(folder / name)
            written.append(folder / name)
    if spectra:
        figure = Figure(figsize=(8, 2.4 * -(-len(spectra) // 2)), dpi=150, layout="constrained")
        _spectra(figure, spectra)
        figure.savefig(folder / SPECTRA)
        written.append(folder / SPECTRA)
    return written


def _sizes(axes, runs: Sequence[Run]) -> bool:  # type: ignore[no-untyped-def]
    for run in runs:
        size = (run.report.bytes_out + run.report.adapter_bytes) / 1e6
        axes.plot(size, run.report.totals["error_mean"], "o", label=run.label)
    axes.set(
        xlabel="weights and adapter, MB", ylabel="relative weight error, mean", xlim=(0, None), ylim=(0, None)
    )
    axes.legend()
    return True


def _spectra(figure, spectra: Sequence[Spectrum]) -> None:  # type: ignore[no-untyped-def]
    for number, spectrum in enumerate(spectra):
        axes = figure.add_subplot(-(-len(spectra) // 2), 2, number + 1)
        axes.plot(spectrum.before, label="plain quantisation")
        axes.plot(spectrum.after, label="stored, adapter included")
        axes.set_title(spectrum.label, fontsize=8)
        axes.set(ylim=(0, None))
        axes.tick_params(labelsize=7)
    figure.axes[0].legend(fontsize=7)
    figure.supylabel("singular values of what is missing, over ||W||", fontsize=8)


def _kinds(axes, runs: Sequence[Run]) -> bool:  # type: ignore[no-untyped-def]
    for run in runs:
        found = groups(run.report.layers)
        axes.plot([group.error for group in found], [group.kind for group in found], "o", label=run.label)
    axes.set(xlabel="relative weight error, mean", xlim=(0, None))
    axes.invert_yaxis()
    axes.legend()
    return True


def _iterations(axes, runs: Sequence[Run]) -> bool:  # type: ignore[no-untyped-def]
    drawn = False
    for run in runs:
        traces = [layer.trace for layer in run.report.layers if len(layer.trace) > 1 and layer.trace[0] > 0]
        if traces:
            count = max(map(len, traces))
            middle = [
                sorted(trace[min(i, len(trace) - 1)] / trace[0] for trace in traces)[len(traces) // 2]
                for i in range(count)
            ]
            axes.plot(range(count), middle, "o-", label=run.label)
            drawn = True
    axes.set(xlabel="iteration", ylabel="objective relative to its start, median", ylim=(0, None))
    if drawn:
        axes.legend()
    return drawn

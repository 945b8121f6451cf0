"""What each kernel of a model costs on a device: measured once for each shape, kept, added up; see docs/profile.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgecompress.devices import BenchOptions, open_runner
from edgecompress.errors import UsageError
from edgecompress.files import cache_folder, staged_file
from edgecompress.kernels import Kernel, Probe, empty_probe, find_kernels
from edgecompress.latency import stability_warnings

if TYPE_CHECKING:
    from edgecompress.latency import LatencySamples

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]

_GROUP = 8  # probes that are in memory together and take turns with the whole model
_MANY_INPUTS = 32


@dataclass(frozen=True, kw_only=True)
class KernelCost:
    """What one run of a kernel takes, in milliseconds; ``reused`` where it was measured for an earlier model."""

    kernel: Kernel
    each_ms: float
    reused: bool


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The costs of a model's kernels on a device, dearest first.

    ``predicted_ms`` is their sum plus ``call_ms``, what a call of the runtime takes; ``measured_ms`` the median of the
    whole model, which ran in turns with the kernels. ``left_out`` names operators whose cost is not in the sum.
    """

    costs: tuple[KernelCost, ...]
    call_ms: float
    predicted_ms: float
    measured_ms: float
    left_out: tuple[str, ...]
    table: Path
    facts: Mapping[str, Any]
    warnings: tuple[str, ...]


def profile_model(
    model: Path,
    *,
    device: str,
    feeds: Mapping[str, Array],
    options: BenchOptions,
    again: bool = False,
    progress: Progress | None = None,
) -> Profile:
    """Measure every kernel of the ONNX file ``model`` on a device, and the model itself.

    A kernel that is in the device's table, which lies in the user's cache, is not measured again, unless ``again``.
    The table belongs to the device's processor, the runtime's version and the number of threads, and is written after
    every few kernels, so that an interrupted run loses nothing. ``progress`` gets (done, total) kernels.

    Raises ``UsageError`` for an emulated device, whose times mean nothing; otherwise as ``Runner.measure`` does.
    """
    runner = open_runner(device)
    kernels, left_out = find_kernels(model, feeds, for_this_machine=device == "local")
    options = replace(options, threads=options.threads or 1)
    with TemporaryDirectory(prefix="edgecompress-") as name:

        def measure(probes: Sequence[Probe]) -> list[LatencySamples]:
            files = [model]
            for index, probe in enumerate(probes):
                files.append(Path(name) / f"{index}.onnx")
                files[-1].write_bytes(probe.proto.SerializeToString())
            return runner.measure(files, feeds=[feeds, *(probe.feeds for probe in probes)], options=options)

        whole, *calls = measure([empty_probe(1), empty_probe(_MANY_INPUTS)])
        if whole.emulated:
            raise UsageError(f"{device} is emulated: its times mean nothing", hint="profile on a real device")
        path = _table_path(whole, options)
        table = {} if again else _read_table(path)
        known = set(table)
        call = _line(calls)
        totals = list(whole.values_ms)
        missing = [(kernel, probe) for kernel, probe in kernels if kernel.signature not in table]
        for start in range(0, len(missing), _GROUP):
            group = missing[start : start + _GROUP]
            whole, *samples = measure([probe for _, probe in group])
            totals += whole.values_ms
            for (kernel, probe), each in zip(group, samples, strict=True):
                table[kernel.signature] = _entry(kernel, probe, each, call)
            _write_table(path, table, whole, options)
            if progress:
                progress(len(kernels) - len(missing) + start + len(group), len(kernels))
    costs = [
        KernelCost(kernel=kernel, each_ms=float(table[kernel.signature]["ms"]), reused=kernel.signature in known)
        for kernel, _ in kernels
    ]
    return _profile(costs, sum(call), replace(whole, values_ms=tuple(totals)), left_out, path)


def _profile(
    costs: Sequence[KernelCost], call_ms: float, whole: LatencySamples, left_out: tuple[str, ...], path: Path
) -> Profile:
    return Profile(
        costs=tuple(sorted(costs, key=lambda cost: -cost.each_ms * cost.kernel.count)),
        call_ms=call_ms,
        predicted_ms=call_ms + sum(cost.each_ms * cost.kernel.count for cost in costs),
        measured_ms=float(np.median(whole.values_ms)),
        left_out=left_out,
        table=path,
        facts=whole.metadata,
        warnings=stability_warnings(whole),
    )


def _line(calls: Sequence[LatencySamples]) -> tuple[float, float]:
    """Return what a call takes, in milliseconds: whatever its inputs are, and for each of them."""
    few, many = (float(np.median(samples.values_ms)) for samples in calls)
    slope = max((many - few) / (_MANY_INPUTS - 1), 0.0)
    return max(few - slope, 0.0), slope


def _entry(kernel: Kernel, probe: Probe, samples: LatencySamples, call: tuple[float, float]) -> dict[str, Any]:
    """Return a row of the table: what the kernel is, and the cost of one run of it."""
    fixed, each_input = call
    own = float(np.median(samples.values_ms)) - fixed - each_input * len(probe.feeds)
    shapes = [list(shape) for shape in kernel.shapes]
    row = {"op": kernel.op, "types": list(kernel.types), "shapes": shapes, "samples": len(samples.values_ms)}
    return {**row, "ms": max(own / probe.copies, 0.0)}


def _table_path(samples: LatencySamples, options: BenchOptions) -> Path:
    """Return where the costs of this device, runtime and number of threads are kept."""
    facts = [samples.metadata.get(key) for key in ("cpu_model", "machine", "cores", "browser", "onnxruntime")]
    text = json.dumps([*facts, options.threads, options.cores])
    return cache_folder() / "kernels" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _read_table(path: Path) -> dict[str, dict[str, Any]]:
    """Return the costs that are known; none where there is no table or it is damaged."""
    try:
        costs = json.loads(path.read_bytes())["costs"]
        good = all(isinstance(row["ms"], float) and row["ms"] >= 0 for row in costs.values())
        return dict(costs) if good else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _write_table(
    path: Path, table: Mapping[str, Mapping[str, Any]], samples: LatencySamples, options: BenchOptions
) -> None:
    """Keep the costs, with rows that another process has added in the meantime."""
    device = {key: samples.metadata.get(key) for key in ("cpu_model", "machine", "cores", "browser", "onnxruntime")}
    content = {"device": device, "threads": options.threads, "cores": list(options.cores)}
    costs = {**_read_table(path), **table}
    with staged_file(path, force=True) as staging:
        staging.write_text(json.dumps({**content, "costs": dict(sorted(costs.items()))}, indent=1), encoding="utf-8")

import EdgeModel
import Foundation
import OnnxRuntimeBindings

private let warmupBatchMs = 50.0
private let warmupLimitMs = 1000.0
private let warmupLimitRuns = 200
private let stable = 0.05
private let mostBlocks = 10

/// Open the model, compare its outputs, time it, and return what `run.py --json` of other bundles prints. Throws a
/// `Problem` for wrong outputs, before anything is timed.
func benchmark(runs: Int, threads: Int, accelerator: Accelerator, device: [String: Any]) throws -> [String: Any] {
    let inputs = try Settings.inputs.map { try TensorFile(readChecked($0)) }
    let expected = try Settings.outputs.map { try TensorFile(readChecked($0)) }
    let start = now()
    let model = try EdgeModel(threads: threads, accelerator: accelerator)
    let initMs = now() - start
    let feeds = Dictionary(uniqueKeysWithValues: try inputs.map { ($0.name, try $0.value()) })
    let firstMs = try firstRun(model, feeds, expected)
    let timer = { (count: Int) -> [Double] in
        try (0..<count).map { _ in
            let start = now()
            _ = try autoreleasepool { try model.run(feeds) }
            return now() - start
        }
    }
    let warmup = try warmUp(timer, firstMs: firstMs)
    let values = try blockSizes(runs).flatMap(timer)
    let row: [String: Any] = [
        "model": Settings.model, "outputs_match": true, "init_ms": initMs, "first_ms": firstMs,
        "warmup_ms": warmup, "values_ms": values, "median_ms": quantile(values, 0.5),
        "p90_ms": quantile(values, 0.9), "samples": values.count, "peak_rss_bytes": peakRssBytes(),
    ]
    let facts = ["onnxruntime": ORTVersion() ?? "", "accelerator": accelerator.rawValue] as [String: Any]
    return [
        "schema_version": 2, "target": Settings.target, "threads": threads, "results": [row],
        "device": device.merging(facts) { _, new in new }, "after": [String: Any](), "notes": [String](),
    ]
}

private func firstRun(_ model: EdgeModel, _ feeds: [String: ORTValue], _ expected: [TensorFile]) throws -> Double {
    let start = now()
    let outputs = try model.run(feeds)
    let firstMs = now() - start
    for wanted in expected {
        let found = outputs[wanted.name]
        let problem = try found.map { try wanted.difference($0, relative: Settings.tolerance) } ?? "missing"
        if let problem { throw Problem(description: "wrong outputs: '\(wanted.name)' \(problem)") }
    }
    return firstMs
}

/// Milliseconds of a clock that never goes back.
private func now() -> Double { Double(DispatchTime.now().uptimeNanoseconds) / 1e6 }

/// Split `runs` into at most ten blocks of nearly the same size.
func blockSizes(_ runs: Int) -> [Int] {
    let blocks = min(runs, mostBlocks)
    return (0..<blocks).map { runs / blocks + ($0 < runs % blocks ? 1 : 0) }
}

/// Run in batches until two in a row have medians within 5 %, or for a second, or 200 times.
func warmUp(_ timer: (Int) throws -> [Double], firstMs: Double) throws -> [Double] {
    let size = min(max(Int((warmupBatchMs / max(firstMs, 1e-3)).rounded(.up)), 1), 20)
    var samples = try timer(size)
    var before = quantile(samples, 0.5)
    while samples.reduce(0, +) < warmupLimitMs && samples.count < warmupLimitRuns {
        let batch = try timer(size)
        samples += batch
        let median = quantile(batch, 0.5)
        if abs(median - before) <= stable * before { break }
        before = median
    }
    return samples
}

/// A quantile by linear interpolation.
func quantile(_ values: [Double], _ share: Double) -> Double {
    let sorted = values.sorted()
    let place = Double(sorted.count - 1) * share
    let below = Int(place)
    return sorted[below] + (place - Double(below)) * (sorted[min(below + 1, sorted.count - 1)] - sorted[below])
}

/// The most memory that this process has held so far.
private func peakRssBytes() -> Int {
    var usage = rusage()
    getrusage(RUSAGE_SELF, &usage)
    return usage.ru_maxrss
}

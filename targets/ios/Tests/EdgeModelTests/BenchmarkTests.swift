import EdgeModel
import Foundation
import XCTest

/// Compares the outputs on this device with the expected ones and times the model. The result, one JSON object, is
/// printed and attached to the test.
///
///     xcodebuild test -scheme EdgeModel -destination 'platform=iOS,name=NAME' TEST_RUNNER_EDGECOMPRESS_RUNS=100
///
/// Variables: EDGECOMPRESS_RUNS, EDGECOMPRESS_THREADS, EDGECOMPRESS_ACCELERATOR (cpu, coreML or xnnpack).
final class BenchmarkTests: XCTestCase {
    func testTheOutputsAreTheExpectedOnesAndTheModelIsTimed() throws {
        let given = ProcessInfo.processInfo.environment
        let result = try benchmark(
            runs: given["EDGECOMPRESS_RUNS"].flatMap { Int($0) } ?? 50,
            threads: given["EDGECOMPRESS_THREADS"].flatMap { Int($0) } ?? Settings.threads,
            accelerator: given["EDGECOMPRESS_ACCELERATOR"].flatMap(Accelerator.init) ?? Settings.accelerator,
            device: deviceFacts()
        )
        let text = String(decoding: try JSONSerialization.data(withJSONObject: result), as: UTF8.self)
        print(text)
        let attachment = XCTAttachment(string: text)
        attachment.name = "edgecompress.json"
        attachment.lifetime = .keepAlways
        add(attachment)
    }

    private func deviceFacts() -> [String: Any] {
        var system = utsname()
        uname(&system)
        let machine = withUnsafeBytes(of: &system.machine) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
        let process = ProcessInfo.processInfo
        return [
            "machine": machine, "cores": process.activeProcessorCount, "os": process.operatingSystemVersionString,
            "thermal_state": process.thermalState.rawValue,
        ]
    }
}

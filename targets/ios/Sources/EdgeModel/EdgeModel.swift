import CryptoKit
import Foundation
import OnnxRuntimeBindings

/// What runs the operators. Those that an accelerator does not know run on the CPU.
public enum Accelerator: String, CaseIterable {
    case cpu, coreML, xnnpack
}

/// A file of the bundle that is not what it was when the bundle was built.
public struct DamagedBundle: Error, CustomStringConvertible {
    public let path: String
    public var description: String { "\(path) was altered: its SHA-256 is not that of the bundle" }
}

/// The model of this package, ready to run. Opening takes time and memory: keep it.
///
///     let model = try EdgeModel()
///     let input = try ORTValue(tensorData: floats, elementType: .float, shape: [1, 3, 32, 32])
///     let outputs = try model.run(["input": input])
///     let scores = try outputs["output"]!.tensorData()
public final class EdgeModel {
    public let session: ORTSession
    public let outputNames: Set<String>
    private let environment: ORTEnv // has to live as long as the session

    /// Open the model. Throws `DamagedBundle`, or the runtime's error when it does not load the model or lacks the
    /// accelerator.
    public init(threads: Int = Settings.threads, accelerator: Accelerator = Settings.accelerator) throws {
        _ = try readChecked(Settings.model)
        environment = try ORTEnv(loggingLevel: .warning)
        session = try ORTSession(
            env: environment,
            modelPath: bundledFile(Settings.model).path,
            sessionOptions: EdgeModel.options(threads: threads, accelerator: accelerator)
        )
        outputNames = Set(try session.outputNames())
    }

    public func run(_ inputs: [String: ORTValue]) throws -> [String: ORTValue] {
        try session.run(withInputs: inputs, outputNames: outputNames, runOptions: nil)
    }

    private static func options(threads: Int, accelerator: Accelerator) throws -> ORTSessionOptions {
        let options = try ORTSessionOptions()
        // XNNPACK has threads of its own; those of the runtime would only take turns with them.
        try options.setIntraOpNumThreads(accelerator == .xnnpack ? 1 : Int32(threads))
        switch accelerator {
        case .cpu:
            break
        case .coreML:
            try options.appendCoreMLExecutionProvider(with: ORTCoreMLExecutionProviderOptions())
        case .xnnpack:
            let own = ORTXnnpackExecutionProviderOptions()
            own.intra_op_num_threads = Int32(threads)
            try options.addConfigEntry(withKey: "session.intra_op.allow_spinning", value: "0")
            try options.appendXnnpackExecutionProvider(with: own)
        }
        return options
    }
}

/// Where a file of the bundle lies in the built package.
func bundledFile(_ path: String) -> URL {
    Bundle.module.resourceURL!.appendingPathComponent("Model").appendingPathComponent(path)
}

/// Read a file of the bundle and compare it with its SHA-256.
public func readChecked(_ path: String) throws -> Data {
    let data = try Data(contentsOf: bundledFile(path))
    let digest = SHA256.hash(data: data).map { String(format: "%02x", $0) }.joined()
    guard digest == Settings.digests[path] else { throw DamagedBundle(path: path) }
    return data
}

import Foundation
import OnnxRuntimeBindings

/// What a file of test data, or an output, has wrong.
struct Problem: Error, CustomStringConvertible {
    let description: String
}

/// A tensor of the bundle's test data: an ONNX TensorProto with raw_data, or string_data for texts.
struct TensorFile {
    var name = ""
    var type = 0
    var shape: [Int] = []
    var raw = Data()
    var texts: [String] = []

    private static let string = 8
    // data_type of onnx.proto: what the runtime calls it, and the bytes of a value.
    private static let types: [Int: ORTTensorElementDataType] = [
        1: .float, 2: .uInt8, 3: .int8, 6: .int32, 7: .int64, 8: .string, 12: .uInt32, 13: .uInt64,
    ]
    private static let float = 1
    private static let step = 0x1p-23 // from 1 to the next float

    init(_ bytes: Data) throws {
        var message = Message(bytes: [UInt8](bytes))
        while let field = try message.next() {
            switch (field.number, field.value) {
            case (1, .number(let dim)): shape.append(Int(dim))
            case (1, .bytes(let packed)):
                var inner = Message(bytes: packed)
                while !inner.atEnd { shape.append(Int(try inner.varint())) }
            case (2, .number(let number)): type = Int(number)
            case (6, .bytes(let text)): texts.append(String(decoding: text, as: UTF8.self))
            case (8, .bytes(let text)): name = String(decoding: text, as: UTF8.self)
            case (9, .bytes(let content)): raw = Data(content)
            default: break
            }
        }
        guard TensorFile.types[type] != nil else { throw Problem(description: "data_type \(type) is not supported") }
    }

    func value() throws -> ORTValue {
        let dims = shape.map { NSNumber(value: $0) }
        if type == TensorFile.string { return try ORTValue(tensorStringData: texts, shape: dims) }
        return try ORTValue(tensorData: NSMutableData(data: raw), elementType: TensorFile.types[type]!, shape: dims)
    }

    /// Say how an output differs from this expected one; nil where they agree. Numbers with a point may differ by
    /// `relative` of the largest magnitude, at least by sixteen steps of their type; all else must be equal.
    func difference(_ actual: ORTValue, relative: Double) throws -> String? {
        let info = try actual.tensorTypeAndShapeInfo()
        let dims = info.shape.map { $0.intValue }
        if dims != shape { return "shape \(dims) instead of \(shape)" }
        if info.elementType != TensorFile.types[type] { return "another type" }
        if type == TensorFile.string { return try actual.tensorStringData() == texts ? nil : "other texts" }
        let found = try actual.tensorData() as Data
        if type != TensorFile.float { return found == raw ? nil : "other values" }
        let (exact, given) = (numbers(raw), numbers(found))
        if exact.count != given.count { return "\(given.count) values instead of \(exact.count)" }
        var (largest, worst) = (0.0, 0.0)
        for (wanted, got) in zip(exact, given) {
            if wanted.isFinite && got.isFinite {
                largest = max(largest, abs(wanted))
                worst = max(worst, abs(got - wanted))
            } else if !(wanted == got || (wanted.isNaN && got.isNaN)) {
                return "NaN or Inf at other places"
            }
        }
        let allowed = max(relative, 16 * TensorFile.step) * largest
        return worst > allowed ? "off by \(worst), allowed \(allowed)" : nil
    }

    private func numbers(_ data: Data) -> [Double] {
        let bytes = [UInt8](data)
        return stride(from: 0, to: bytes.count - bytes.count % 4, by: 4).map { at in
            let bits = (0..<4).reduce(UInt32(0)) { $0 | UInt32(bytes[at + $1]) << UInt32(8 * $1) }
            return Double(Float(bitPattern: bits))
        }
    }
}

/// The fields of a protocol buffer, one after the other.
private struct Message {
    enum Value {
        case number(UInt64)
        case bytes([UInt8])
    }

    let bytes: [UInt8]
    private var at = 0

    init(bytes: [UInt8]) { self.bytes = bytes }

    var atEnd: Bool { at == bytes.count }

    mutating func next() throws -> (number: Int, value: Value)? {
        if atEnd { return nil }
        let key = try varint()
        let number = Int(key >> 3)
        switch key & 7 {
        case 0: return (number, .number(try varint()))
        case 1: return (number, .bytes(try take(8)))
        case 2: return (number, .bytes(try take(Int(clamping: try varint()))))
        case 5: return (number, .bytes(try take(4)))
        default: throw Problem(description: "malformed tensor: wire type \(key & 7)")
        }
    }

    mutating func varint() throws -> UInt64 {
        var result: UInt64 = 0
        for shift in stride(from: UInt64(0), to: 64, by: 7) {
            let byte = UInt64(try take(1)[0])
            result |= (byte & 127) << shift
            if byte < 128 { return result }
        }
        throw Problem(description: "malformed tensor: a number of more than 64 bits")
    }

    private mutating func take(_ size: Int) throws -> [UInt8] {
        guard (0...bytes.count - at).contains(size) else {
            throw Problem(description: "malformed tensor: it ends too early")
        }
        at += size
        return Array(bytes[(at - size)..<at])
    }
}

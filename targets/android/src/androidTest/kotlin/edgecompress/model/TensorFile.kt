package edgecompress.model

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.TensorInfo
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.abs
import kotlin.math.max
import kotlin.math.pow

/** A tensor of the bundle's test data: an ONNX TensorProto with raw_data, or string_data for texts. */
class TensorFile(
    val name: String,
    private val type: OnnxJavaType,
    private val shape: LongArray,
    private val raw: ByteArray,
    private val texts: List<String>,
) {

    fun toTensor(environment: OrtEnvironment): OnnxTensor {
        if (type == OnnxJavaType.STRING) return OnnxTensor.createTensor(environment, texts.toTypedArray(), shape)
        val buffer = ByteBuffer.allocateDirect(raw.size).order(ByteOrder.nativeOrder())
        buffer.put(raw).rewind()
        return OnnxTensor.createTensor(environment, buffer, shape, type)
    }

    /**
     * Say how an output differs from this expected one; null where they agree. Numbers with a point may differ by
     * `relative` of the largest magnitude, at least by sixteen steps of their type; all else must be equal.
     */
    fun difference(actual: OnnxTensor, relative: Double): String? {
        val info = actual.info as TensorInfo
        if (!info.shape.contentEquals(shape)) return "shape ${info.shape.toList()} instead of ${shape.toList()}"
        if (info.type != type) return "type ${info.type} instead of $type"
        if (type == OnnxJavaType.STRING) return if (textsOf(actual.value) == texts) null else "other texts"
        val found = ByteArray(raw.size).also { actual.byteBuffer.order(ByteOrder.nativeOrder()).get(it) }
        val step = STEPS[type] ?: return if (found.contentEquals(raw)) null else "other values"
        val exact = numbers(raw, type)
        val given = numbers(found, type)
        var largest = 0.0
        var worst = 0.0
        for (index in exact.indices) {
            if (exact[index].isFinite() && given[index].isFinite()) {
                largest = max(largest, abs(exact[index]))
                worst = max(worst, abs(given[index] - exact[index]))
            } else if (exact[index].compareTo(given[index]) != 0) {
                return "NaN or Inf at other places"
            }
        }
        val allowed = max(relative, 16 * step) * largest
        return if (worst > allowed) "off by $worst, allowed $allowed" else null
    }

    companion object {
        // data_type of onnx.proto
        private val TYPES = mapOf(
            1 to OnnxJavaType.FLOAT, 2 to OnnxJavaType.UINT8, 3 to OnnxJavaType.INT8, 5 to OnnxJavaType.INT16,
            6 to OnnxJavaType.INT32, 7 to OnnxJavaType.INT64, 8 to OnnxJavaType.STRING, 9 to OnnxJavaType.BOOL,
            10 to OnnxJavaType.FLOAT16, 11 to OnnxJavaType.DOUBLE,
        )

        // The distance from 1 to the next number.
        private val STEPS = mapOf(
            OnnxJavaType.FLOAT16 to 2.0.pow(-10),
            OnnxJavaType.FLOAT to 2.0.pow(-23),
            OnnxJavaType.DOUBLE to 2.0.pow(-52),
        )

        /** @throws IllegalArgumentException for anything else */
        fun read(bytes: ByteArray): TensorFile {
            val shape = mutableListOf<Long>()
            val texts = mutableListOf<String>()
            var name = ""
            var number = 0
            var raw = ByteArray(0)
            val message = Message(bytes)
            while (message.next()) {
                when (message.field) {
                    1 -> if (message.wire == 0) shape += message.value else shape += message.packed()
                    2 -> number = message.value.toInt()
                    6 -> texts += message.content.decodeToString()
                    8 -> name = message.content.decodeToString()
                    9 -> raw = message.content
                }
            }
            val type = requireNotNull(TYPES[number]) { "data_type $number is not supported" }
            return TensorFile(name, type, shape.toLongArray(), raw, texts)
        }

        private fun numbers(raw: ByteArray, type: OnnxJavaType): DoubleArray {
            val buffer = ByteBuffer.wrap(raw).order(ByteOrder.LITTLE_ENDIAN)
            return when (type) {
                OnnxJavaType.FLOAT -> DoubleArray(raw.size / 4) { buffer.getFloat(4 * it).toDouble() }
                OnnxJavaType.DOUBLE -> DoubleArray(raw.size / 8) { buffer.getDouble(8 * it) }
                else -> DoubleArray(raw.size / 2) { half(buffer.getShort(2 * it).toInt()) }
            }
        }

        private fun half(bits: Int): Double {
            val exponent = bits shr 10 and 31
            val rest = bits and 1023
            val size = when (exponent) {
                31 -> if (rest == 0) Double.POSITIVE_INFINITY else Double.NaN
                0 -> rest * 2.0.pow(-24)
                else -> (1 + rest / 1024.0) * 2.0.pow(exponent - 15)
            }
            return if (bits and 0x8000 == 0) size else -size
        }

        /** The texts of a tensor in order; the runtime gives them as nested arrays. */
        private fun textsOf(value: Any?): List<String> =
            if (value is Array<*>) value.flatMap(::textsOf) else listOf(value.toString())
    }
}

/** The fields of a protocol buffer, one after the other. */
private class Message(private val bytes: ByteArray) {
    private var at = 0
    var field = 0
        private set
    var wire = 0
        private set
    var value = 0L
        private set
    var content = ByteArray(0)
        private set

    fun next(): Boolean {
        if (at == bytes.size) return false
        val key = varint()
        field = (key shr 3).toInt()
        wire = (key and 7).toInt()
        when (wire) {
            0 -> value = varint()
            1 -> content = take(8)
            2 -> content = take(varint().toInt())
            5 -> content = take(4)
            else -> throw IllegalArgumentException("malformed tensor: wire type $wire")
        }
        return true
    }

    fun packed(): List<Long> {
        val inner = Message(content)
        return buildList { while (inner.at < content.size) add(inner.varint()) }
    }

    private fun varint(): Long {
        var result = 0L
        for (shift in 0 until 64 step 7) {
            val byte = take(1)[0].toLong()
            result = result or ((byte and 127) shl shift)
            if (byte >= 0) return result
        }
        throw IllegalArgumentException("malformed tensor: a number of more than 64 bits")
    }

    private fun take(size: Int): ByteArray {
        require(size in 0..bytes.size - at) { "malformed tensor: it ends too early" }
        at += size
        return bytes.copyOfRange(at - size, at)
    }
}

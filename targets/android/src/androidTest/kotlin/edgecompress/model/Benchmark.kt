package edgecompress.model

import ai.onnxruntime.OnnxTensor
import java.io.InputStream
import kotlin.math.abs
import kotlin.math.ceil
import kotlin.math.floor
import kotlin.math.max
import kotlin.math.min

private const val WARMUP_BATCH_MS = 50.0
private const val WARMUP_LIMIT_MS = 1000.0
private const val WARMUP_LIMIT_RUNS = 200
private const val STABLE = 0.05
private const val BLOCKS = 10

/** The outputs are not those that the model had where the bundle was built. */
class WrongOutputs(message: String) : Exception(message)

/**
 * Open the model, compare its outputs, time it, and return what `run.py --json` of other bundles prints.
 *
 * @throws WrongOutputs before anything is timed
 */
fun benchmark(
    asset: (String) -> InputStream,
    runs: Int,
    threads: Int,
    accelerator: Accelerator,
    device: Map<String, Any?>,
): Map<String, Any?> {
    val inputs = Settings.INPUTS.map { TensorFile.read(readChecked(asset, it)) }
    val expected = Settings.OUTPUTS.map { TensorFile.read(readChecked(asset, it)) }
    val start = System.nanoTime()
    EdgeModel.open(asset, threads, accelerator).use { model ->
        val initMs = millisecondsSince(start)
        val feeds = inputs.associate { it.name to it.toTensor(model.environment) }
        val firstMs = firstRun(model, feeds, expected)
        val timer = { count: Int -> List(count) { timed { model.run(feeds).close() } } }
        val warmup = warmUp(timer, firstMs)
        val values = blockSizes(runs).flatMap(timer)
        val row = mapOf(
            "model" to Settings.MODEL, "outputs_match" to true, "init_ms" to initMs, "first_ms" to firstMs,
            "warmup_ms" to warmup, "values_ms" to values, "median_ms" to quantile(values, 0.5),
            "p90_ms" to quantile(values, 0.9), "samples" to values.size, "peak_rss_bytes" to peakRssBytes(),
        )
        val facts = device + mapOf("onnxruntime" to model.environment.version, "accelerator" to accelerator.name)
        return mapOf(
            "schema_version" to 2, "target" to Settings.TARGET, "threads" to threads, "results" to listOf(row),
            "device" to facts, "after" to emptyMap<String, Any?>(), "notes" to emptyList<String>(),
        )
    }
}

private fun firstRun(model: EdgeModel, feeds: Map<String, OnnxTensor>, expected: List<TensorFile>): Double {
    val start = System.nanoTime()
    model.run(feeds).use { outputs ->
        val firstMs = millisecondsSince(start)
        for (wanted in expected) {
            val found = outputs.get(wanted.name).orElse(null) as? OnnxTensor
            val problem = if (found == null) "missing" else wanted.difference(found, Settings.TOLERANCE)
            if (problem != null) throw WrongOutputs("wrong outputs: '${wanted.name}' $problem")
        }
        return firstMs
    }
}

private inline fun timed(run: () -> Unit): Double {
    val start = System.nanoTime()
    run()
    return millisecondsSince(start)
}

private fun millisecondsSince(start: Long) = (System.nanoTime() - start) / 1e6

/** Split `runs` into at most ten blocks of nearly the same size. */
fun blockSizes(runs: Int): List<Int> {
    val blocks = min(runs, BLOCKS)
    return List(blocks) { runs / blocks + if (it < runs % blocks) 1 else 0 }
}

/** Run in batches until two in a row have medians within 5 %, or for a second, or 200 times. */
fun warmUp(timer: (Int) -> List<Double>, firstMs: Double): List<Double> {
    val size = ceil(WARMUP_BATCH_MS / max(firstMs, 1e-3)).toInt().coerceIn(1, 20)
    val samples = timer(size).toMutableList()
    var before = quantile(samples, 0.5)
    while (samples.sum() < WARMUP_LIMIT_MS && samples.size < WARMUP_LIMIT_RUNS) {
        val batch = timer(size)
        samples += batch
        val median = quantile(batch, 0.5)
        if (abs(median - before) <= STABLE * before) break
        before = median
    }
    return samples
}

/** A quantile by linear interpolation. */
fun quantile(values: List<Double>, share: Double): Double {
    val sorted = values.sorted()
    val place = (sorted.size - 1) * share
    val below = floor(place).toInt()
    return sorted[below] + (place - below) * (sorted[min(below + 1, sorted.size - 1)] - sorted[below])
}

/** The most memory that this process has held so far. */
private fun peakRssBytes(): Long? = runCatching {
    val line = java.io.File("/proc/self/status").readLines().first { it.startsWith("VmHWM:") }
    line.split(Regex("\\s+"))[1].toLong() * 1024
}.getOrNull()

/** JSON of maps, lists, texts, numbers, booleans and null. */
fun json(value: Any?): String = when (value) {
    is Map<*, *> -> value.entries.joinToString(",", "{", "}") { "${json(it.key.toString())}:${json(it.value)}" }
    is List<*> -> value.joinToString(",", "[", "]") { json(it) }
    is String -> value.map(::escaped).joinToString("", "\"", "\"")
    else -> value.toString()
}

private fun escaped(letter: Char) = if (letter in "\"\\" || letter < ' ') "\\u%04x".format(letter.code) else "$letter"

package edgecompress.model

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.io.InputStream
import java.security.MessageDigest

/** What runs the operators. Those that an accelerator does not know run on the CPU. */
enum class Accelerator { CPU, XNNPACK, NNAPI }

/**
 * The model of this module, ready to run. Opening takes time and memory: keep it.
 *
 *     EdgeModel.open(context.assets::open).use { model ->
 *         val input = OnnxTensor.createTensor(model.environment, floats, longArrayOf(1, 3, 32, 32))
 *         model.run(mapOf("input" to input)).use { outputs -> ... }
 *     }
 */
class EdgeModel private constructor(val environment: OrtEnvironment, val session: OrtSession) : AutoCloseable {

    /** Run the model; close the result when it is not needed any more. */
    fun run(inputs: Map<String, OnnxTensor>): OrtSession.Result = session.run(inputs)

    override fun close() = session.close()

    companion object {
        /**
         * Open the model. `asset` gives the content of an asset, such as `context.assets::open`.
         *
         * @throws IllegalStateException when the model is not the one that this module was built with
         * @throws ai.onnxruntime.OrtException when the runtime does not load it, or lacks the accelerator
         */
        fun open(
            asset: (String) -> InputStream,
            threads: Int = Settings.THREADS,
            accelerator: Accelerator = Settings.ACCELERATOR,
        ): EdgeModel {
            val environment = OrtEnvironment.getEnvironment()
            val model = readChecked(asset, Settings.MODEL)
            val session = options(threads, accelerator).use { environment.createSession(model, it) }
            return EdgeModel(environment, session)
        }

        private fun options(threads: Int, accelerator: Accelerator): OrtSession.SessionOptions {
            val options = OrtSession.SessionOptions()
            // XNNPACK has threads of its own; those of the runtime would only take turns with them.
            options.setIntraOpNumThreads(if (accelerator == Accelerator.XNNPACK) 1 else threads)
            when (accelerator) {
                Accelerator.CPU -> Unit
                Accelerator.NNAPI -> options.addNnapi()
                Accelerator.XNNPACK -> {
                    options.addConfigEntry("session.intra_op.allow_spinning", "0")
                    options.addXnnpack(mapOf("intra_op_num_threads" to threads.toString()))
                }
            }
            return options
        }
    }
}

/** Read an asset and compare it with its SHA-256. */
fun readChecked(asset: (String) -> InputStream, path: String): ByteArray {
    val bytes = asset(path).use { it.readBytes() }
    val digest = MessageDigest.getInstance("SHA-256").digest(bytes).joinToString("") { "%02x".format(it) }
    check(digest == Settings.DIGESTS[path]) { "$path was altered: its SHA-256 is not that of the bundle" }
    return bytes
}

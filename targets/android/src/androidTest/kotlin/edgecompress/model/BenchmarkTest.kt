package edgecompress.model

import android.os.Build
import android.os.Bundle
import android.util.Log
import androidx.test.ext.junit.runners.AndroidJUnit4
import androidx.test.platform.app.InstrumentationRegistry
import org.junit.Test
import org.junit.runner.RunWith
import java.io.File

/**
 * Compares the outputs on this device with the expected ones and times the model. The result, one JSON object, is in
 * the log under the tag "edgecompress", in the status of the instrumentation, and in edgecompress.json below
 * build/outputs/connected_android_test_additional_output.
 *
 *     gradle connectedAndroidTest -Pandroid.testInstrumentationRunnerArguments.runs=100
 *
 * Arguments: runs, threads, accelerator (CPU, XNNPACK or NNAPI).
 */
@RunWith(AndroidJUnit4::class)
class BenchmarkTest {
    @Test
    fun theOutputsAreTheExpectedOnesAndTheModelIsTimed() {
        val arguments = InstrumentationRegistry.getArguments()
        val instrumentation = InstrumentationRegistry.getInstrumentation()
        val result = benchmark(
            asset = instrumentation.targetContext.assets::open,
            runs = arguments.getString("runs", "50").toInt(),
            threads = arguments.getString("threads", Settings.THREADS.toString()).toInt(),
            accelerator = Accelerator.valueOf(arguments.getString("accelerator", Settings.ACCELERATOR.name)),
            device = deviceFacts(),
        )
        val text = json(result)
        Log.i("edgecompress", text)
        instrumentation.sendStatus(0, Bundle().apply { putString("edgecompress", text) })
        arguments.getString("additionalTestOutputDir")?.let { File(it, "edgecompress.json").writeText(text) }
    }

    private fun deviceFacts(): Map<String, Any?> = mapOf(
        "cpu_model" to if (Build.VERSION.SDK_INT >= 31) Build.SOC_MODEL else Build.HARDWARE,
        "machine" to Build.SUPPORTED_ABIS.first(),
        "cores" to Runtime.getRuntime().availableProcessors(),
        "os" to "Android ${Build.VERSION.RELEASE} (API ${Build.VERSION.SDK_INT})",
        "phone" to "${Build.MANUFACTURER} ${Build.MODEL}",
    )
}

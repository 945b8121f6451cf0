package edgecompress.model

/** What this module was built with: see manifest.json. */
object Settings {
    const val TARGET = "@TARGET@"
    const val MODEL = "@MODEL@"
    const val THREADS = @THREADS@
    const val TOLERANCE = @TOLERANCE@
    val ACCELERATOR = Accelerator.@ACCELERATOR@
    val INPUTS = listOf(@INPUTS@)
    val OUTPUTS = listOf(@OUTPUTS@)

    /** The SHA-256 of every asset. */
    val DIGESTS = mapOf(
        @DIGESTS@
    )
}

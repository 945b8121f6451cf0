/// What this package was built with: see manifest.json.
public enum Settings {
    public static let target = "@TARGET@"
    public static let model = "@MODEL@"
    public static let threads = @THREADS@
    public static let tolerance = @TOLERANCE@
    public static let accelerator = Accelerator.@ACCELERATOR@
    public static let inputs = [@INPUTS@]
    public static let outputs = [@OUTPUTS@]

    /// The SHA-256 of every file of the bundle that the package carries.
    static let digests = [
        @DIGESTS@
    ]
}

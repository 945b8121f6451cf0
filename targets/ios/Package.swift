// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "EdgeModel",
    platforms: [.iOS(.v16), .macOS(.v14)],
    products: [
        .library(name: "EdgeModel", targets: ["EdgeModel"]),
    ],
    dependencies: [
        .package(url: "https://github.com/microsoft/@PACKAGE@", exact: "@VERSION@"),
    ],
    targets: [
        .target(
            name: "EdgeModel",
            dependencies: [.product(name: "onnxruntime", package: "@PACKAGE@")],
            // A folder named Resources would break the signing of an application.
            resources: [.copy("Model")]
        ),
        .testTarget(name: "EdgeModelTests", dependencies: ["EdgeModel"]),
    ]
)

"""Time one-dimensional k-means beside scikit-learn's KMeans, in one run on the same values.

    python benchmarks/kmeans.py [--millions 10] [--clusters 16] [--threads 1]

Prints seconds and the mean squared error of both, and their ratios. The values are drawn from a normal distribution
with a few outliers, like the weights of a trained layer. Ours uses one thread.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from edgecompress.cluster.kmeans import kmeans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=10.0, help="how many values")
    parser.add_argument("--clusters", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of scikit-learn")
    options = parser.parse_args()
    values = _weights(int(options.millions * 1e6))

    began = time.perf_counter()
    ours = kmeans(values, options.clusters).to_dense()
    our_seconds = time.perf_counter() - began

    with threadpool_limits(options.threads):
        began = time.perf_counter()
        model = KMeans(options.clusters, n_init=1, random_state=0).fit(values[:, None])
        their_seconds = time.perf_counter() - began
    theirs = model.cluster_centers_.astype(np.float32)[model.labels_, 0]

    our_error, their_error = (float(np.mean((values - found) ** 2, dtype=np.float64)) for found in (ours, theirs))
    print(f"{values.size:,} float32 values, {options.clusters} clusters, {options.threads} thread(s) for scikit-learn")
    print(f"edgecompress  {our_seconds:8.2f} s   mean squared error {our_error:.6e}")
    print(f"scikit-learn  {their_seconds:8.2f} s   mean squared error {their_error:.6e}   {model.n_iter_} rounds")
    print(f"{their_seconds / our_seconds:.1f} times faster, error {our_error / their_error:.5f} times theirs")


def _weights(size: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    values = generator.normal(scale=0.05, size=size).astype(np.float32)
    values[:: max(1, size // 1000)] *= 10
    return values


if __name__ == "__main__":
    main()

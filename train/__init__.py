"""The experiments of Liang & Huang (AAAI 2021), and the networks that they and the benchmarks use."""

"""What the emulator predicts beside what others published: a markdown table.

    python benchmarks/emulator/fidelity.py

Every prediction is made with the shipped hardware file, whose efficiencies are the same for all
rows; nothing is fitted to a row. Where a source does not tell the lengths, 128 tokens in and out
are taken, which matter little for one user. Rows marked † are those whose range of bandwidth
efficiency (0.61 to 0.87) suggested the file's 0.70, so they are no validation of it, and the
median is taken over the others. Rows marked ‡ are of an 8B model whose config was not at hand: its
shape is taken to be that of Qwen3-8B.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from pytest_llmserve.emulator.catalog import load_hardware, load_model
from pytest_llmserve.emulator.physics import Machine
from pytest_llmserve.emulator.scheduler import Policy
from pytest_llmserve.emulator.simulate import simulate
from pytest_llmserve.metrics.roofline import Batch, ModelShape, Precision, step_time

# Not shipped with the emulator, but published figures are of it (the config.json on the hub).
QWEN25_7B = ModelShape.from_config(
    {
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18_944,
        "vocab_size": 152_064,
    },
    "Qwen2.5-7B",
)
LLAMA_70B = ModelShape.from_config(
    {
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28_672,
        "vocab_size": 128_256,
    },
    "Llama-3.3-70B",
)


@dataclass(frozen=True)
class Point:
    """One published figure, in tokens/s, measured on a DGX Spark.

    `figure`: `decode` is the rate of a fixed batch of `users` with `prompt` tokens of context, as
    llama-batched-bench measures it; else a figure of `Simulated` under a closed loop.
    """

    source: str
    model: ModelShape
    weights: str
    kv: str
    users: int
    prompt: int
    output: int
    figure: str
    published: float
    mark: str = ""


GGML = "llama.cpp, benches/dgx-spark.md (ggml-org/llama.cpp 4c7e989)"
DJANGO = "vLLM, djangodevreng/dgx-spark-benchmarks"
NOTES = "manavsehgal/ai-field-notes"
BUILDER = "AI-Daily-Builder, 13 models on a DGX Spark, 2026-05-24"
LYB = "vLLM, lyb.re, 2026-03-10"
PLAYBOOKS = "vLLM, NVIDIA/dgx-spark-playbooks#79 (4.0 to 4.2)"
QWEN3_8B, LLAMA_8B = load_model("qwen3-8b"), load_model("llama-3.1-8b")

# S_TG of Qwen2.5-Coder-7B in Q8_0: context → batch → tokens/s. Q8_0 has 8.5 bits a weight, head
# included: 7.5 GB a step; as FP8 with a BF16 head it is 7.6 GB.
BATCHED_BENCH = {
    512: {1: 29.24, 8: 195.67, 16: 335.01, 32: 593.27},
    4096: {1: 28.42, 8: 163.10, 16: 252.80, 32: 377.05},
    8192: {1: 27.50, 8: 138.88, 16: 196.21, 32: 268.20},
}

POINTS = (
    *(
        Point(GGML, QWEN25_7B, "fp8", "bf16", users, context, 32, "decode", rate,
              "†" if context == 512 else "")
        for context, rates in BATCHED_BENCH.items()
        for users, rate in rates.items()
    ),
    Point(DJANGO, QWEN3_8B, "bf16", "bf16", 1, 128, 128, "output_throughput", 12.6, "‡"),
    Point(DJANGO, QWEN3_8B, "bf16", "bf16", 25, 4096, 500, "output_throughput", 136, "‡"),
    Point(DJANGO, QWEN3_8B, "fp8", "bf16", 25, 4096, 500, "output_throughput", 208, "‡"),
    Point(LYB, QWEN3_8B, "bf16", "bf16", 1, 128, 128, "output_throughput", 13.1),
    Point(LYB, load_model("qwen3-32b"), "bf16", "bf16", 1, 128, 128, "output_throughput", 3.7),
    Point(PLAYBOOKS, LLAMA_70B, "nvfp4", "bf16", 1, 128, 1024, "output_throughput", 4.1),
    Point(f"SGLang, {BUILDER}", LLAMA_8B, "fp8", "bf16", 1, 2048, 128, "decode", 20.5),
    Point(f"TensorRT-LLM, {BUILDER}", LLAMA_8B, "nvfp4", "fp8", 1, 2048, 128, "decode", 38.65),
    Point(f"vLLM, {NOTES}", LLAMA_8B, "fp8", "bf16", 1, 128, 128, "output_throughput", 22.1),
    Point(f"TensorRT-LLM, {NOTES}", LLAMA_8B, "nvfp4", "fp8", 1, 128, 128,
          "output_throughput", 38.8),
)  # fmt: skip


def predict(point: Point) -> float:
    hardware = load_hardware("dgx-spark")
    precision = Precision(point.weights, point.kv)
    if point.figure == "decode":
        batch = Batch.decode(point.users, point.prompt + point.output // 2)
        return point.users / step_time(point.model, hardware, precision, batch).total
    figures = simulate(
        Machine(point.model, hardware, precision),
        Policy(),
        users=point.users,
        prompt=point.prompt,
        output=point.output,
        requests=4,
    )
    return float(getattr(figures, point.figure))


def main() -> None:
    print("| source | model | weights | users | in / out | figure | published | emulated | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    errors = []
    for point in POINTS:
        value = predict(point)
        error = value / point.published - 1
        if point.mark != "†":
            errors.append(abs(error))
        print(
            f"| {point.source}{point.mark} | {point.model.name} | "
            f"{point.weights} | {point.users} | {point.prompt} / {point.output} | "
            f"{point.figure.replace('_', ' ')} | {point.published:g} tok/s | {value:.4g} tok/s | "
            f"{error:+.0%} |"
        )
    print(f"\nMedian size of the error, rows without †: {statistics.median(errors):.0%}")


if __name__ == "__main__":
    main()

"""An emulated LLM server: a real scheduler and a real API over a machine that is only arithmetic.

`python -m pytest_llmserve.emulator` serves. `scheduler` and `kv` decide what runs in a step,
`physics` how long the step takes, `pacing` keeps that time exactly, `answer` and `dialects` write
what a client sees, `http` and `server` carry it, `faults` spoil it, and `truth` says afterwards
what really happened. `simulate` is the same without a server and without waiting.
"""

"""A server that somebody else runs: find out what it is, and that it serves what is wanted."""

from __future__ import annotations

import os

from pytest_llmserve.engines import MODULES, get_engine
from pytest_llmserve.errors import ServerError
from pytest_llmserve.launch.probe import Answer, ask, fetcher, served_models
from pytest_llmserve.servers import Server, ServerConfig


def attach(config: ServerConfig) -> Server:
    """The server at `config.endpoint`, as it describes itself.

    Its engine is told by its own words, so that an emulated engine behind a URL is never taken
    for a real one. Raises ServerError, in one sentence with the mend, if nothing answers there,
    the key is not accepted, or the model asked for is not served.
    """
    endpoint = (config.endpoint or "").rstrip("/").removesuffix("/v1")
    api_key = read_api_key(config)
    answer = ask(endpoint, "/v1/models", api_key)
    models = served_models(answer.json())
    if not models:
        raise ServerError(f"{endpoint} {_problem(answer, config)}")
    model = config.served_model_name or config.model or models[0]
    if model not in models:
        raise ServerError(
            f"{endpoint} does not serve {model!r}; it serves {', '.join(models)}: name one of "
            "these (--llmserve-model), or leave the model out."
        )
    name, emulated = identify(endpoint, api_key, answer)
    engine = get_engine(name)
    fetch = fetcher(endpoint, api_key)
    return Server(
        config=config,
        endpoint=endpoint,
        model=model,
        engine=engine.name,
        version=engine.version(fetch),
        effective=engine.effective(fetch),
        emulated=emulated,
        api_key=api_key,
    )


def read_api_key(config: ServerConfig) -> str | None:
    """The key from the variable that the config names; ServerError if that is not set."""
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ServerError(
            f"{config.source or config.name}: api_key_env: the environment variable "
            f"{config.api_key_env} is not set; set it to the server's API key."
        )
    return key


def identify(endpoint: str, api_key: str | None, models: Answer) -> tuple[str, bool]:
    """The name of the engine behind an endpoint ("attach" if it does not tell), and whether it
    is emulated. `models` is its answer to /v1/models."""
    rows = [row for row in models.json()["data"] if isinstance(row, dict)]
    owners = {str(row.get("owned_by", "")).lower() for row in rows}
    metrics = ask(endpoint, "/metrics", api_key)
    if _says_emulated(owners, ask(endpoint, "/version", api_key), metrics):
        return "emulator", True
    engines = [get_engine(name) for name in MODULES if name not in ("emulator", "attach")]
    for engine in engines:
        text = metrics.text if engine.metrics == "/metrics" else ""
        if engine.metrics not in ("", "/metrics"):
            text = ask(endpoint, engine.metrics, api_key).text
        if engine.metrics_prefix and any(
            line.startswith(engine.metrics_prefix) for line in text.splitlines()
        ):
            return engine.name, False
    for engine in engines:
        if engine.owned_by and engine.owned_by in owners:
            return engine.name, False
    return "attach", False


def _says_emulated(owners: set[str], version: Answer, metrics: Answer) -> bool:
    """Whether a server confesses in any place where an emulated engine does.

    Values that a user chooses (model names, paths) are not looked at: a real server's model
    may well lie in a folder called "emulator".
    """
    names = [line.partition("{")[0] for line in metrics.text.splitlines()]
    words = [*owners, version.text if version.status == 200 else "", *names]
    return any("emulat" in word.lower() for word in words)


def _problem(answer: Answer, config: ServerConfig) -> str:
    if answer.status == 0:
        return (
            f"{answer.problem}: start the server, or correct the endpoint "
            "(--llmserve-endpoint, or `endpoint` of the server config)."
        )
    if answer.status in (401, 403):
        key = config.api_key_env
        mend = f"correct the key in {key}" if key else "name the variable with it in api_key_env"
        return f"wants an API key (HTTP status {answer.status}): {mend}."
    return (
        f"answers /v1/models with HTTP status {answer.status} and no list of models: it is not an "
        "OpenAI-compatible server, or still loading; correct the endpoint."
    )

"""Routes that clients of OpenAI and vLLM know and this server does not have: told apart from a mistyped one."""

from __future__ import annotations

ABSENT: dict[str, str] = {
    "/v1/embeddings": "embeddings",
    "/v1/audio": "speech and transcriptions",
    "/v1/images": "images",
    "/v1/videos": "videos",
    "/v1/realtime": "realtime sessions",
    "/v1/moderations": "moderations",
    "/v1/files": "files",
    "/v1/uploads": "uploads",
    "/v1/batches": "batches",
    "/v1/fine_tuning": "fine-tuning",
    "/v1/assistants": "assistants",
    "/v1/threads": "threads of assistants",
    "/v1/vector_stores": "vector stores",
    "/v1/rerank": "reranking",
    "/v2/rerank": "reranking",
    "/rerank": "reranking",
    "/v1/score": "scores of text pairs",
    "/score": "scores of text pairs",
    "/pooling": "pooled states",
    "/classify": "classification",
}
"""What is behind each path and all paths below it."""


def why_absent(path: str) -> str | None:
    """One sentence about a known route that is not here; None for a path that nobody knows."""
    known = next((start for start in ABSENT if path == start or path.startswith(f"{start}/")), None)
    return known and f"This server generates text; it does not offer {ABSENT[known]}, and has no route {known}."

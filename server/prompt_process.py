"""The process that renders and encodes prompts: one job at a time, and it may be ended in the middle of any.

A chat template is a program of a stranger and a prompt may be megabytes of anything, so neither runs where all
requests are served. Started by server.prompt_pool with the number of its socket.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import socket
import sys
import traceback
from pathlib import Path

import msgspec

from server.encoding import PromptEncoder
from server.errors import ContextTooLong, InvalidRequest, StartupError, UnsupportedParameter
from server.grammar_check import GrammarChecker
from server.messages import frame
from server.prompt_messages import (
    MEMORY_BYTES,
    OUT_OF_MEMORY,
    Chat,
    Check,
    Checked,
    Encode,
    EncodeWords,
    Failed,
    FromPromptProcess,
    Ids,
    Load,
    Loaded,
    Predict,
    Refused,
    ToPromptProcess,
)
from verifier.ipc import FrameReader

_LOADING_BYTES = 4 * 2**30
"""Memory for reading a tokenizer and a template; large ones take a tenth of it."""
_READ_BYTES = 2**20
_ORPHAN_S = 5
"""The API process ends a job when its time is up; so much later it ends by itself, if nobody is left to do it."""


def main() -> None:
    """Answer jobs until the API process hangs up."""
    link = socket.socket(fileno=int(sys.argv[1]))
    decoder: msgspec.msgpack.Decoder[ToPromptProcess] = msgspec.msgpack.Decoder(ToPromptProcess)
    reader = FrameReader()
    desk = _Desk()
    try:
        while data := link.recv(_READ_BYTES):
            for body in reader.feed(data):
                link.sendall(frame(desk.answer(decoder.decode(body))))
                del body
                desk.prepare()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


class _Desk:
    """Answers one message after the other. Owns tokenizer, template and compiler of grammars."""

    def __init__(self) -> None:
        self._encoder: PromptEncoder | None = None
        self._checker: GrammarChecker | None = None

    def answer(self, message: ToPromptProcess) -> FromPromptProcess:
        """Raises MemoryError; what else goes wrong is an answer."""
        try:
            if isinstance(message, Load):
                _allow(_LOADING_BYTES)
                self._encoder = PromptEncoder(message.files)
                _allow(MEMORY_BYTES)
                return Loaded()
            signal.alarm(math.ceil(message.timeout_s) + _ORPHAN_S)
            if isinstance(message, EncodeWords):
                return self._encode_words(message)
            if isinstance(message, Check):
                self.prepare()
                assert self._checker is not None, "a job before the files"
                return Checked(self._checker.check(message.grammar))
            return Ids(tuple(self._encode(message)))
        except InvalidRequest as error:
            is_too_long, is_unsupported = isinstance(error, ContextTooLong), isinstance(error, UnsupportedParameter)
            return Refused(error.message, error.param, is_too_long=is_too_long, is_unsupported=is_unsupported)
        except StartupError as error:
            return Refused(str(error))
        except MemoryError:
            raise
        except Exception:
            return Failed(traceback.format_exc())
        finally:
            signal.alarm(0)

    def _encode_words(self, job: EncodeWords) -> Ids:
        assert self._encoder is not None, "a job before the files"
        words = self._encoder.words(job.texts, job.param)
        return Ids(tuple(token for word in words for token in word), tuple(map(len, words)))

    def prepare(self) -> None:
        """Load the compiler of grammars, when the files are read and nobody waits: no job's time pays for it."""
        if self._checker is None and self._encoder is not None:
            self._checker = GrammarChecker(self._encoder.special_tokens)

    def _encode(self, job: Chat | Encode | Predict) -> list[int]:
        assert self._encoder is not None, "a job before the files"
        if isinstance(job, Chat):
            tools, kwargs = json.loads(job.extras) if job.extras else ((), {})
            return self._encoder.chat(
                job.messages,
                job.max_model_len,
                ending=job.ending,
                tools=tools,
                kwargs=kwargs,
                effort=job.effort,
            )
        if isinstance(job, Encode):
            return self._encoder.encode(
                job.text, job.max_model_len, job.param, add_special_tokens=job.add_special_tokens
            )
        return self._encoder.predict(job.text, job.max_model_len, job.param)


def _allow(num_bytes: int) -> None:
    """Bound the memory of this process to what it has now and `num_bytes` more, where the kernel tells and obeys."""
    status = Path("/proc/self/status")
    if not status.exists():
        return
    kib = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmData:"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = kib * 1024 + num_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main()

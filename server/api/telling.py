"""What an answer tells besides its text: token ids, special tokens, log-probabilities of the prompt, padding."""

from __future__ import annotations

from dataclasses import dataclass

from server.api.schema import Common, CompletionRequest, StreamOptions
from server.errors import InvalidRequest, UnsupportedParameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Telling:
    """The wishes of one request; the defaults are those of a request that has none."""

    shows_special: bool = False
    """Special tokens are part of the text, by their names."""
    has_token_ids: bool = False
    """The ids of prompt and answer are told too."""
    names_are_ids: bool = False
    """Tokens with log-probabilities are named `token_id:5`."""
    num_prompt_logprobs: int = -1
    """-1 for none, else how many alternatives to tell at each token of the prompt, in `prompt_logprobs`."""
    num_echo_logprobs: int = -1
    """The same for an echoed prompt, whose tokens are among those of the answer's `logprobs`."""
    is_padded: bool = False
    """Each chunk of a stream is filled up with random text, so that its size tells nothing."""

    @property
    def num_scored(self) -> int:
        """Alternatives that the worker is asked for at each token of the prompt; -1 for none."""
        return max(self.num_prompt_logprobs, self.num_echo_logprobs)


NOTHING_MORE = Telling()


def telling_of(request: Common, max_logprobs: int) -> Telling:
    """The wishes of a request. Raises InvalidRequest, UnsupportedParameter."""
    options = request.stream_options or StreamOptions()
    num_prompt = -1 if request.prompt_logprobs is None else request.prompt_logprobs
    if num_prompt > max_logprobs:
        raise InvalidRequest(
            f"'prompt_logprobs' may be at most {max_logprobs} on this server (--max-logprobs), got {num_prompt}.",
            param="prompt_logprobs",
        )
    if num_prompt >= 0 and request.stream:
        raise UnsupportedParameter(
            "'prompt_logprobs' is not supported together with 'stream'; 'echo' with 'logprobs' of a completion is.",
            param="prompt_logprobs",
        )
    num_echo = -1
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        num_echo = request.logprobs
    return Telling(
        shows_special=request.skip_special_tokens is False,
        has_token_ids=bool(request.return_token_ids),
        names_are_ids=bool(request.return_tokens_as_token_ids),
        num_prompt_logprobs=num_prompt,
        num_echo_logprobs=num_echo,
        is_padded=bool(options.include_obfuscation),
    )

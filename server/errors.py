"""Every error a user can see, with its HTTP status and its OpenAI type and code.

ServingError
  InvalidRequest          400  invalid_request_error   invalid_value
    UnsupportedParameter  400  invalid_request_error   unsupported_parameter
      NoThreads           400  invalid_request_error   unsupported_parameter
    ContextTooLong        400  invalid_request_error   context_length_exceeded
    InvalidApiKey         401  authentication_error    invalid_api_key
    NotFound              404  invalid_request_error   not_found
      ModelNotFound       404  invalid_request_error   model_not_found
    MethodNotAllowed      405  invalid_request_error   method_not_allowed
    BodyTooLarge          413  invalid_request_error   request_too_large
  Overloaded              429  rate_limit_error        server_overloaded   (Retry-After, retry-after-ms)
  EngineUnavailable       503  server_error            engine_unavailable  (Retry-After, retry-after-ms)
    AnswerLost            503  server_error            engine_unavailable  (Retry-After, retry-after-ms)
  RequestFailed           500  server_error            request_failed
"""

from __future__ import annotations

from typing import ClassVar


class ServingError(Exception):
    """An error told to the client. `param` names the field, `retry_after_s` asks to come back."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(ServingError):
    """The request cannot be right; the message names the field and the limit."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedParameter(InvalidRequest):
    """A field that is not honoured (yet): refused, never ignored."""

    code = "unsupported_parameter"


class NoThreads(UnsupportedParameter):
    """A conversation that the server should hold, in Anthropic's API. Its client can do without if it is told so."""

    def __init__(self) -> None:
        super().__init__("'thread' is not supported: send the whole conversation.", param="thread")


class ContextTooLong(InvalidRequest):
    """The prompt leaves no room in the model's context."""

    code = "context_length_exceeded"


class InvalidApiKey(InvalidRequest):
    """No key, or not one of ours."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFound(InvalidRequest):
    """No such route."""

    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """No such model is served."""

    code = "model_not_found"


class MethodNotAllowed(InvalidRequest):
    """The route exists, the method does not."""

    status = 405
    code = "method_not_allowed"


class BodyTooLarge(InvalidRequest):
    """The body is over the limit."""

    status = 413
    code = "request_too_large"


class Overloaded(ServingError):
    """The queue is full; come back after `retry_after_s`."""

    status = 429
    type = "rate_limit_error"
    code = "server_overloaded"


class EngineUnavailable(ServingError):
    """The worker is starting, draining, or gone for good."""

    status = 503
    code = "engine_unavailable"


class AnswerLost(EngineUnavailable):
    """The same to the client, of a request that had been admitted: no refusal but an answer that failed."""


class RequestFailed(ServingError):
    """This one request could not be finished; others go on."""

    code = "request_failed"


class StartupError(Exception):
    """The server cannot start: one clear line, exit code 2. Raised before any request exists.

    If it `is_final`, starting again as things are will not help.
    """

    def __init__(self, message: str, *, is_final: bool = True):
        super().__init__(message)
        self.is_final = is_final

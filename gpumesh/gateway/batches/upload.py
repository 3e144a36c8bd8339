"""``Upload`` reads the form of ``POST /v1/files`` as it comes: the file's bytes go to the store piece by piece."""

from __future__ import annotations

from collections.abc import AsyncIterator

from gpumesh.gateway.body_parsers.form_data import read_boundary
from gpumesh.gateway.body_parsers.upload_form import FileStart, FormEvent, FormField, UploadParser
from gpumesh.gateway.http.errors import BadRequest, body_too_large
from gpumesh.gateway.http.request import MAX_LENGTH_DIGITS, Request
from gpumesh.text.printable import printable

MAX_FILE_BYTES = 512 << 20  # as OpenAI's API allows; a batch of 50,000 prompts of 2,000 tokens has 400 MiB
MAX_FORM_BYTES = 64 << 10  # of the form's other parts and of its boundaries
MAX_NAME_CHARS = 200
PURPOSE = "batch"


class Upload:
    """The form of one request. ``pieces``: its body (``Request.read_body_pieces``). Call ``read_name`` first, and then
    iterate ``read_file``. Both raise BadRequest for what is no form with a file for batches, and the errors of
    ``pieces``. ``most_bytes``: the file is not longer than that, by what the client has announced."""

    def __init__(self, request: Request, pieces: AsyncIterator[bytes]) -> None:
        boundary = read_boundary(request.headers)
        if boundary is None:
            raise BadRequest("a file is sent as a form: Content-Type: multipart/form-data", status=415)
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise BadRequest("a file is sent without Content-Encoding", status=415)
        length = (request.headers.get("content-length") or "").lstrip("0")
        if len(length) > MAX_LENGTH_DIGITS or int(length or "0") > MAX_FILE_BYTES + MAX_FORM_BYTES:
            raise body_too_large()
        self.most_bytes = int(length or MAX_FILE_BYTES)
        self._parser = UploadParser(boundary)
        self._pieces = pieces
        self._events: list[FormEvent] = []  # not handled yet
        self._purpose: str | None = None

    def __repr__(self) -> str:
        return f"<Upload {self._parser!r}>"

    async def read_name(self) -> str:
        """Reads up to the file. Returns the name that the client gives it."""
        while True:
            for index, event in enumerate(self._events):
                if isinstance(event, FileStart):
                    self._events = self._events[index + 1 :]
                    return printable(_last_part(event.name), MAX_NAME_CHARS) or "file"
                self._take_field(event)
            if not await self._read_more():
                raise BadRequest("the form has no part `file`")

    async def read_file(self) -> AsyncIterator[bytes]:
        """Yields the bytes of the file. After the last of them, reads the rest of the form, and checks it."""
        size = 0
        while True:
            for event in self._events:
                if isinstance(event, bytes):
                    size += len(event)
                    if size > MAX_FILE_BYTES:
                        raise body_too_large()
                    yield event
                else:
                    self._take_field(event)
            if not await self._read_more():
                break
        if self._purpose is None:
            raise BadRequest(f"purpose is required: it is `{PURPOSE}`")

    def _take_field(self, event: FormEvent) -> None:
        """Checks a part that is not the file. All but the purpose say how long a file is kept, or are not known."""
        if isinstance(event, FormField) and event.name == "purpose":
            self._purpose = event.value
            if event.value != PURPOSE:
                raise BadRequest(f"purpose is `{PURPOSE}`: files are kept here for batches only")

    async def _read_more(self) -> bool:
        """Reads the next piece of the body. Returns False at its end, and checks that the form has ended, too."""
        self._events = []
        piece = await anext(self._pieces, None)
        if piece is None:
            self._parser.finish()
            return False
        self._events = self._parser.feed(piece)
        return True


def _last_part(name: str) -> str:
    """The name without folders: browsers once sent the whole path."""
    return name.replace("\\", "/").rpartition("/")[2]

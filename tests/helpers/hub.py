"""A small server that answers as the hub of Hugging Face does to somebody who downloads a file."""

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Serves `files`, path -> bytes; each is named after the SHA-256 of `published`, the same unless something is wrong."""

    daemon_threads = True

    def __init__(self, files, commit):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.published, self.commit = files, dict(files), commit
        self.cut = 0
        """Answers of which only half is sent before the connection ends."""
        self.asked = []
        """Method, path, and Range of every request for a data set; the client asks other things as well."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(files, commit):
    with Hub(files, commit) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        content = self.answer()
        if content and self.server.cut:
            self.server.cut -= 1
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)

    def answer(self):
        """The head of the answer; returns what belongs below it."""
        hub, asked = self.server, self.headers.get("Range")
        if self.path.startswith("/datasets/"):
            hub.asked.append((self.command, self.path, asked))
        content = hub.files.get(self.path)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            content = b""
        else:
            begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", f'"{hashlib.sha256(hub.published[self.path]).hexdigest()}"')
            content = content[begin:]
        self.send_header("X-Repo-Commit", hub.commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def log_message(self, *arguments):
        pass

"""A small local server that imitates the Hugging Face hub for file downloads."""

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Serves `files`, path -> bytes, with the SHA-256 of `published`, which a test can make differ from `files`."""

    daemon_threads = True

    def __init__(self, files, commit):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.published, self.commit = files, dict(files), commit
        self.responses_to_cut = 0
        """Responses to end after half of their bytes."""
        self.requests = []
        """Method, path and Range of each request for a dataset file."""

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
        self.send_head()

    def do_GET(self):
        content = self.send_head()
        if content and self.server.responses_to_cut:
            self.server.responses_to_cut -= 1
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)

    def send_head(self):
        """Send status and headers; returns the body."""
        hub, byte_range = self.server, self.headers.get("Range")
        if self.path.startswith("/datasets/"):
            hub.requests.append((self.command, self.path, byte_range))
        content = hub.files.get(self.path)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            content = b""
        else:
            begin = int(byte_range.removeprefix("bytes=").removesuffix("-")) if byte_range else 0
            self.send_response(206 if byte_range else 200)
            if byte_range:
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", f'"{hashlib.sha256(hub.published[self.path]).hexdigest()}"')
            content = content[begin:]
        self.send_header("X-Repo-Commit", hub.commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def log_message(self, *arguments):
        pass

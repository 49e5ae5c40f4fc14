"""A mirror of the hub, named by HF_ENDPOINT: a server here that speaks as much of its API as it takes."""

import http.server
import json
import threading

import pytest
import zstandard

COMMIT = "a" * 40
RECORDS = [f"record {number} of the mirror" for number in range(50)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in RECORDS)
FILES = {"train.jsonl.zst": zstandard.compress(LINES.encode()), "README.md": b"---\n---\n"}
INFO = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
TREE = [
    {"type": "file", "path": name, "size": len(data), "oid": name} for name, data in FILES.items()
]


class Mirror(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        api, dataset = "/api/datasets/owner/name", "/datasets/owner/name/resolve"
        answers = {
            "/": b"",
            f"{api}/revision/{COMMIT}": json.dumps(INFO).encode(),
            f"{api}/tree/{COMMIT}": json.dumps(TREE).encode(),
            f"{api}/tree/{COMMIT}/data": b"[]",
        }
        for name, data in FILES.items():
            answers[f"{dataset}/main/{name}"] = answers[f"{dataset}/{COMMIT}/{name}"] = data
        body = answers.get(path, b"")
        self.send_response(200 if path in answers else 404)
        self.send_header("Content-Length", str(len(body)))
        if path not in answers:
            self.send_header("X-Error-Code", "EntryNotFound")
        elif path.startswith(dataset):
            self.send_header("ETag", f'"{path.rpartition("/")[2]}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


PREPARE = """
from stablemask.data import load_documents, prepare_corpus
print(load_documents("hub:owner/name")[0])
print(len({prepare_corpus("hub:owner/name", block_size=8, vocab_size=300).key for _ in range(2)}))
"""


def test_the_mirror_is_asked(mirror, python, tmp_path):
    endpoint = f"http://127.0.0.1:{mirror.server_port}"
    output, errors = python(PREPARE, HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path))
    assert output.splitlines() == [RECORDS[0], "1"], errors
    assert f"/datasets/owner/name/resolve/{COMMIT}/train.jsonl.zst" in mirror.asked

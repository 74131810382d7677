"""report.py --watch: only GET, only known addresses, only this machine; a run is shown as it grows."""

import http.client
import json
import threading

import pytest
from page.made_runs import make_run, sample_record

from minidpost.errors import UserError
from minidpost.page.document import parts_of
from minidpost.page.runs import find_runs
from minidpost.page.watch import Watched, new_server
from minidpost.storage import write_jsonl


@pytest.fixture
def served(tmp_path):
    """A server of the runs in a folder, and a function that asks it."""
    folder = tmp_path / "runs"
    folder.mkdir()
    watched = Watched(
        lambda: [path for path in find_runs([folder]) if path != folder], benchmark=None, data_dir=tmp_path
    )
    server = new_server(watched, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()

    def ask(path, method="GET", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read().decode("utf-8")
        connection.close()
        return answer, body

    yield folder, ask
    server.shutdown()
    server.server_close()
    thread.join()


def test_runs_that_begin_and_grow_appear(served):
    folder, ask = served
    answer, page = ask("/")
    assert answer.status == 200 and dict(parts_of(page))["page"]["runs"] == []
    path = make_run(folder / "run", n_iterations=1)
    answer, body = ask("/part/page")
    assert [run["name"] for run in json.loads(body)["runs"]] == ["run"]
    tag = answer.getheader("ETag")
    answer, body = ask("/part/page", If_None_Match=tag)
    assert (answer.status, body) == (304, "")
    (path / "iteration-2" / "sft.unfinished").mkdir(parents=True)
    (path / "iteration-2" / "sft.unfinished" / "log.jsonl").write_text('{"step": 0, "loss": 1.25}\n')
    answer, body = ask("/part/page", If_None_Match=tag)
    training = json.loads(body)["runs"][0]["trainings"][-1]
    assert answer.status == 200
    assert (training["stage"], training["is_finished"], training["columns"]["loss"]) == (
        "iteration-2/sft",
        False,
        [1.25],
    )


def test_questions_and_blocks_are_of_one_version(served):
    from page.test_document import unpacked

    folder, ask = served
    path = make_run(folder / "run", n_iterations=1)
    index = unpacked(json.loads(ask("/part/questions/0")[1]))
    block = f"/part/block/0/0/{index['version']}"
    before = ask(block)[1]
    write_jsonl(path / "iteration-2" / "samples-dpo.jsonl.progress" / "a-000000.jsonl", [sample_record(0, 0, "right")])
    newer = unpacked(json.loads(ask("/part/questions/0")[1]))
    assert newer["version"] != index["version"] and len(newer["rounds"]) == len(index["rounds"]) + 1
    assert ask(block)[1] == before  # for a page that has not asked for the new index yet
    assert ask(f"/part/block/0/1/{index['version']}")[0].status == 404
    assert ask("/part/block/0/0/0123456789abcdef")[0].status == 404


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "/../../etc/passwd", "/part/../../x", "/part/page/", "/part/questions/99", "/part/questions/-1",
     "/runs/run/config.json", "/%2e%2e/x", "/part/block/0/0/" + "0" * 16, "/part/questions/" + "9" * 400],
)  # fmt: skip
def test_other_addresses_are_not_found(served, path):
    assert served[1](path)[0].status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_but_get_is_answered(served, method):
    assert served[1]("/", method=method)[0].status == 501


def test_requests_in_another_name_are_refused(served):
    _, ask = served
    for host in ("evil.example", "evil.example:80", ""):
        assert ask("/", Host=host)[0].status == 403
    for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert ask("/", Host=host)[0].status == 200


def test_nothing_is_stored_or_framed(served):
    answer, _ = served[1]("/")
    headers = {name.lower(): value for name, value in answer.getheaders()}
    assert headers["cache-control"] == "no-store" and headers["x-frame-options"] == "DENY"
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


def test_a_client_that_goes_away_is_no_traceback(tmp_path, capsys):
    def server_after(error):
        with new_server(Watched(list, benchmark=None, data_dir=tmp_path), "127.0.0.1", 0) as server:
            try:
                raise error
            except type(error):
                server.handle_error(None, ("127.0.0.1", 1))
        return capsys.readouterr().err

    assert server_after(BrokenPipeError()) == server_after(ConnectionResetError()) == ""
    assert server_after(KeyError("x\ny")) == "report.py: KeyError('x\\ny')\n"


def test_a_port_that_is_taken_is_one_line(tmp_path):
    watched = Watched(list, benchmark=None, data_dir=tmp_path)
    with new_server(watched, "127.0.0.1", 0) as server, pytest.raises(UserError, match="choose another port"):
        new_server(watched, "127.0.0.1", server.server_port)
